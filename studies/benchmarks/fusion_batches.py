"""Batches for fusion training: rows picked from resident matrices beside a DataLoader that collates dicts.

python -m studies.benchmarks.fusion_batches

Only the supply of batches is measured, without a model: an order for the epoch, then the embeddings, the mask and the
prices of each batch. The DataLoader's rows are ready arrays in one rival; in the other, tensors are made of them on
access, as a Dataset usually does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from contracts.errors import InputError, run_entry_point
from studies.tables import RESULTS
from training.settings import parse_settings

if TYPE_CHECKING:
    from fusion.dataset import FusionTable
    from studies.benchmarks.fusion_rivals import RowDicts


@dataclass
class FusionBatchesSettings:
    rows: int = 60_000
    """Rows of the table."""
    batch_size: int = 256
    """Rows per batch."""
    batches: int = 234
    """Batches per round. The default is the whole epoch, whose order is drawn once."""
    rounds: int = 5
    """Times that every rival is measured, in turns."""
    workers: int = 0
    """Processes that collate for the DataLoader."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the batches are wanted."""
    quick: bool = False
    """Use 2,000 rows, four batches and one round, to see that it runs."""
    out: Path = RESULTS / "fusion_batches.json"
    """Json file to write."""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows = 2000
            self.batches = 4
            self.rounds = 1
        if self.batches * self.batch_size > self.rows:
            raise InputError(
                f"--batches {self.batches}: {self.rows} rows do not give so many batches of {self.batch_size}"
            )


def ours(table: FusionTable, settings: FusionBatchesSettings) -> Callable[[], None]:
    """A round of batches from a table that lies on the device."""
    import torch

    from fusion.all_embeddings.config import AllEmbeddingsSettings
    from fusion.loop import epoch_rows

    log_price = table.log_price.to(settings.device)
    fit = torch.arange(settings.rows)
    training = AllEmbeddingsSettings()

    def work() -> None:
        rows, _ = epoch_rows(table, fit, training, epoch=1)
        for batch in islice(rows.split(settings.batch_size), settings.batches):
            table.take(batch)
            log_price.index_select(0, batch)

    return work


def data_loader(dataset: RowDicts, settings: FusionBatchesSettings) -> Callable[[], None]:
    """A round of batches that a DataLoader collates and that are then sent to the device."""
    from torch.utils.data import DataLoader

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


def bytes_per_batch(table: FusionTable, batch_size: int) -> int:
    """Bytes of one batch: embeddings and log price in float32, and a byte of mask per modality."""
    numbers = sum(table.widths.values()) + 1
    return batch_size * (4 * numbers + table.valid.shape[1])


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(FusionBatchesSettings, argv, description=__doc__.split("\n")[0])
    import copy

    import torch

    from studies.benchmarks import measure
    from studies.benchmarks.fusion_rivals import RowDicts, random_table

    table = random_table(settings.rows)
    arrays = RowDicts(table)
    tensors = copy.copy(arrays)  # the same rows, held once
    tensors.as_tensors = True
    on_device = table.to(torch.device(settings.device))
    rivals = {
        "ours": ours(on_device, settings),
        "DataLoader": data_loader(arrays, settings),
        "DataLoader, a tensor made per row": data_loader(tensors, settings),
    }
    times = measure.interleave(rivals, rounds=settings.rounds)

    copy_rate = (
        measure.copy_bandwidth(settings.device) / 2
    )  # bytes copied, whereas it counts them read and written
    bytes_per_round = settings.batches * bytes_per_batch(table, settings.batch_size)
    rows = []
    for name, seconds in times.items():
        rate = bytes_per_round / seconds["median"]
        rows.append(
            {
                "rival": name,
                "ms_per_batch": 1000 * seconds["median"] / settings.batches,
                "best_ms_per_batch": 1000 * seconds["best"] / settings.batches,
                "gigabytes_per_second": rate / 1e9,
                "share_of_copy_rate": rate / copy_rate,
                "ours_is_faster_by": seconds["median"] / times["ours"]["median"],
            }
        )
    measure.report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
