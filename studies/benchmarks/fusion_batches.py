"""Batches for fusion training: rows picked from resident matrices beside a DataLoader that collates dicts.

python -m studies.benchmarks.fusion_batches

Only the supply is measured, no model: an order for the epoch, then the embeddings, mask and prices of each batch.
The DataLoader's rows are ready arrays, or the tensors that a Dataset usually makes of them on access.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from contracts.errors import InputError, run_entry_point
from contracts.workspace import REPOSITORY
from training.settings import parse_settings


@dataclass
class FusionBatchesSettings:
    rows: int = 60_000
    """rows of the table"""
    batch_size: int = 256
    """rows a batch"""
    batches: int = 234
    """batches a round; 234 are the epoch, whose order is drawn once"""
    rounds: int = 5
    """times that every rival is measured, in turns"""
    workers: int = 0
    """processes that collate for the DataLoader"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the batches are wanted"""
    quick: bool = False
    """2,000 rows, four batches, one round: does it run?"""
    out: str = str(REPOSITORY / "studies" / "results" / "fusion_batches.json")
    """json file to write"""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows, self.batches, self.rounds = 2000, 4, 1
        if self.batches * self.batch_size > self.rows:
            raise InputError(
                f"--batches {self.batches}: {self.rows} rows are fewer batches of {self.batch_size}"
            )


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(FusionBatchesSettings, argv, description=__doc__.split("\n")[0])
    import copy
    from itertools import islice

    import torch
    from torch.utils.data import DataLoader

    from fusion.all_embeddings.config import AllEmbeddingsSettings
    from fusion.loop import epoch_rows
    from studies.benchmarks import measure
    from studies.benchmarks.fusion_rivals import RowDicts, random_table

    table = random_table(settings.rows)
    arrays = RowDicts(table)
    tensors = copy.copy(arrays)
    tensors.as_tensors = True
    table = table.to(torch.device(settings.device))
    log_price, fit = table.log_price.to(settings.device), torch.arange(settings.rows)

    def ours() -> None:
        rows, _ = epoch_rows(table, fit, AllEmbeddingsSettings(), epoch=1)
        for batch in islice(rows.split(settings.batch_size), settings.batches):
            table.take(batch), log_price.index_select(0, batch)

    def collated(dataset: RowDicts) -> Callable[[], None]:
        loader = DataLoader(
            dataset,
            settings.batch_size,
            shuffle=True,
            num_workers=settings.workers,
            pin_memory=settings.device == "cuda",
        )

        def work() -> None:
            for batch in islice(loader, settings.batches):
                for tensor in batch.values():
                    tensor.to(settings.device, non_blocking=True)

        return work

    rivals = {
        "ours": ours,
        "DataLoader": collated(arrays),
        "DataLoader, a tensor made per row": collated(tensors),
    }
    times = measure.interleave(rivals, rounds=settings.rounds)
    copied = measure.copy_bandwidth(settings.device) / 2  # read and written
    per_batch = settings.batch_size * (sum(table.widths.values()) * 4 + table.valid.shape[1] + 4)
    rows = [
        {
            "rival": name,
            "ms_per_batch": 1000 * seconds["median"] / settings.batches,
            "best_ms_per_batch": 1000 * seconds["best"] / settings.batches,
            "gigabytes_per_second": per_batch * settings.batches / seconds["median"] / 1e9,
            "share_of_copy_rate": per_batch * settings.batches / seconds["median"] / copied,
            "ours_is_faster_by": seconds["median"] / times["ours"]["median"],
        }
        for name, seconds in times.items()
    ]
    measure.report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
