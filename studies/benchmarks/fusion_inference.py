"""Pricing with a trained fusion model: batches and single rows, float32 and int8.

python -m studies.benchmarks.fusion_inference

A call is `fusion.loop.predict`: pick the rows, run the model, turn its output into log1p(price). The model is variant
hierarchical at full size, trained for one epoch so that its prices differ. "Full attention" also computes the query and
key projections, which cannot change the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from contracts.errors import run_entry_point
from studies.tables import RESULTS
from training.settings import parse_settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusion.dataset import FusionTable
    from fusion.target import Target


@dataclass
class FusionInferenceSettings:
    rows: int = 5120
    """Rows of the table, which are trained on for an epoch and priced."""
    batch_size: int = 256
    """Rows per batch."""
    single: int = 50
    """Single rows per round."""
    compared: int = 500
    """Rows whose prices are compared."""
    rounds: int = 7
    """Times that every model is measured, in turns."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute; int8 runs on a CPU only."""
    quick: bool = False
    """Use 768 rows and few repeats, to see that it runs."""
    out: Path = RESULTS / "fusion_inference.json"
    """Json file to write."""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows = 768
            self.single = 5
            self.compared = 20
            self.rounds = 2


def trained_model(table: FusionTable, settings: FusionInferenceSettings) -> tuple[nn.Module, Target]:
    """The full-size model after one epoch on all rows."""
    import torch

    from fusion.all_embeddings.config import AllEmbeddingsSettings
    from fusion.all_embeddings.model import AllEmbeddings
    from fusion.loop import epoch_rows, train_epoch
    from fusion.step import TrainingStep
    from fusion.target import Target
    from training.device import seed_everything

    training = AllEmbeddingsSettings(device=settings.device)
    target = Target.of(training, table.log_price)
    seed_everything(0)
    model = AllEmbeddings(training, table.widths)
    model.set_output_bias(target.output_bias)
    model.to(settings.device).train()
    step = TrainingStep(model, table, target, training)
    rows, visible = epoch_rows(table, torch.arange(settings.rows), training, epoch=1)
    train_epoch(step, rows, visible)
    return model, target


def with_full_attention(model: nn.Module, table: FusionTable, device: str) -> nn.Module:
    """A copy of the model that computes the projections which cannot change its result."""
    from fusion.all_embeddings.config import AllEmbeddingsSettings
    from fusion.all_embeddings.model import AllEmbeddings

    full = AllEmbeddings(AllEmbeddingsSettings(short_path=False), table.widths).to(device)
    full.load_state_dict(model.state_dict())
    return full


def price_batch(model: nn.Module, table: FusionTable, target: Target, rows: Tensor) -> Callable[[], object]:
    """A call that prices `rows` at once."""
    from fusion.loop import predict

    return lambda: predict(model, table, rows, target)


def price_singly(model: nn.Module, table: FusionTable, target: Target, rows: Tensor) -> Callable[[], object]:
    """A call that prices `rows` one after the other, as a service does."""
    from fusion.loop import predict

    def work() -> None:
        for row in rows.split(1):
            predict(model, table, row, target)

    return work


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(FusionInferenceSettings, argv, description=__doc__.split("\n")[0])
    import torch

    from fusion.int8 import int8_copy
    from fusion.loop import predict
    from studies.benchmarks import measure
    from studies.benchmarks.fusion_rivals import random_table

    table = random_table(settings.rows).to(torch.device(settings.device))
    model, target = trained_model(table, settings)
    models = {
        "float32": model,
        "float32, full attention": with_full_attention(model, table, settings.device),
    }
    if settings.device == "cpu":
        models["int8"] = int8_copy(model)

    rows = torch.arange(settings.rows)
    works = {}
    for name, chosen in models.items():
        works["batch", name] = price_batch(chosen, table, target, rows[: settings.batch_size])
        works["row", name] = price_singly(chosen, table, target, rows[: settings.single])
    times = measure.interleave(works, rounds=settings.rounds, warmup=2)
    ln_price = {}
    for name, chosen in models.items():
        # row by row, as int8 is meant to be used: the scale of its activations depends on the batch
        log_price = predict(chosen, table, rows[: settings.compared], target, batch_size=1)
        ln_price[name] = log_price.expm1().log()

    results = []
    for name in models:
        of_batch = times["batch", name]
        of_row = times["row", name]
        difference = (ln_price[name] - ln_price["float32"]).abs()
        results.append(
            {
                "model": name,
                "ms_per_row_in_batch": 1000 * of_batch["median"] / settings.batch_size,
                "ms_single_row": 1000 * of_row["median"] / settings.single,
                "best_ms_single_row": 1000 * of_row["best"] / settings.single,
                "float32_takes": times["row", "float32"]["median"] / of_row["median"],
                "ln_price_mean_difference": difference.mean().item(),
                "ln_price_max_difference": difference.max().item(),
                "ln_price_spread": ln_price["float32"].std().item(),
            }
        )
    measure.report(settings.out, results, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
