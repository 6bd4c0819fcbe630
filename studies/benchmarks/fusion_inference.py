"""Pricing with a trained fusion model: batches and single rows, float32 and int8.

python -m studies.benchmarks.fusion_inference

A call is `fusion.loop.predict`: pick the rows, run the model, turn its output into log1p(price). The model is variant
hierarchical at full size, trained for an epoch so that its prices differ. "Full attention" computes
the query and key projections that cannot change the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from contracts.errors import run_entry_point
from contracts.workspace import REPOSITORY
from training.settings import parse_settings


@dataclass
class FusionInferenceSettings:
    rows: int = 5120
    """rows of the table, trained on for an epoch and priced"""
    batch_size: int = 256
    """rows of a batch"""
    single: int = 50
    """single rows a round"""
    compared: int = 500
    """rows whose prices are compared"""
    rounds: int = 7
    """times that every rival is measured, in turns"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to compute; int8 on a CPU only"""
    quick: bool = False
    """768 rows, few repeats: does it run?"""
    out: str = str(REPOSITORY / "studies" / "results" / "fusion_inference.json")
    """json file to write"""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows, self.single, self.compared, self.rounds = 768, 5, 20, 2


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(FusionInferenceSettings, argv, description=__doc__.split("\n")[0])
    import torch

    from fusion.all_embeddings.config import AllEmbeddingsSettings, build_model
    from fusion.int8 import int8_copy
    from fusion.loop import Target, TrainingStep, epoch_rows, predict, train_epoch
    from studies.benchmarks import measure
    from studies.benchmarks.fusion_rivals import WIDTHS, random_table
    from training.device import seed_everything

    table = random_table(settings.rows).to(torch.device(settings.device))
    everything = torch.arange(settings.rows)
    training = AllEmbeddingsSettings(device=settings.device)
    target = Target.of(training, table.log_price)
    seed_everything(0)
    model = build_model(training, WIDTHS)
    model.set_output_bias(target.output_bias)
    model.to(settings.device).train()
    train_epoch(TrainingStep(model, table, target), *epoch_rows(table, everything, training, epoch=1))
    full = build_model(AllEmbeddingsSettings(short_path=False), WIDTHS).to(settings.device)
    full.load_state_dict(model.state_dict())
    models = {"float32": model, "float32, full attention": full}
    if settings.device == "cpu":
        models["int8"] = int8_copy(model)

    batch = everything[: settings.batch_size]
    works = {}
    for name, chosen in models.items():
        works["batch", name] = lambda chosen=chosen: predict(chosen, table, batch, target)
        works["row", name] = lambda chosen=chosen: [
            predict(chosen, table, everything[row : row + 1], target) for row in range(settings.single)
        ]
    times = measure.interleave(works, rounds=settings.rounds, warmup=2)
    ln_price = {  # row by row, as int8 is meant
        name: predict(chosen, table, everything[: settings.compared], target, batch_size=1).expm1().log()
        for name, chosen in models.items()
    }
    rows = []
    for name in models:
        difference = (ln_price[name] - ln_price["float32"]).abs()
        by_batch, by_row = times["batch", name], times["row", name]
        rows.append({
            "model": name,
            "ms_per_row_in_batch": 1000 * by_batch["median"] / settings.batch_size,
            "ms_single_row": 1000 * by_row["median"] / settings.single,
            "best_ms_single_row": 1000 * by_row["best"] / settings.single,
            "float32_takes": times["row", "float32"]["median"] / by_row["median"],
            "ln_price_mean_difference": difference.mean().item(),
            "ln_price_max_difference": difference.max().item(),
            "ln_price_spread": ln_price["float32"].std().item(),
        })  # fmt: skip
    measure.report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
