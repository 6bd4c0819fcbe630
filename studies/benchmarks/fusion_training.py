"""Fusion training: our step on resident tables beside transformers' Trainer and the usual DataLoader loop.

    python -m studies.benchmarks.fusion_training
    python -m studies.benchmarks.fusion_training --device cuda --compile

All rivals train the same model (variant hierarchical, 13.46 M parameters) from the same weights, with the same loss,
AdamW, gradient clipping, dropout and modality dropout, on batches of the same size. On a CPU a round is a few steps,
from which the time of an epoch is extrapolated; on CUDA a round is a whole epoch. The time that the Trainer needs to
start (a call with one step) is not counted.

Each rival trains the model twice: with our layers, so that only the loop differs, and with "plain layers", as one would
write them first: full attention, torch's own dropout, the branch's scale before its product, and a list of experts.
Shares of the product rate count the products of our form, the fewest that the model needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from contracts.errors import InputError, run_entry_point
from studies.tables import RESULTS
from training.settings import parse_settings

if TYPE_CHECKING:
    from torch import nn

    from fusion.target import Target


@dataclass
class FusionTrainingSettings:
    rows: int = 60_000
    """Rows of the table; all of them are trained on."""
    batch_size: int = 256
    """Rows per step."""
    steps: int = 12
    """Steps per round on a CPU."""
    rounds: int = 5
    """Times that every rival is measured, in turns."""
    workers: int = 0
    """Processes that collate batches for the rivals; on two cores they only take time from the model."""
    compile: bool = False
    """Also measure our step compiled, on CUDA as a graph."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    quick: bool = False
    """Use 2,000 rows, two steps and one round, to see that it runs."""
    out: Path = RESULTS / "fusion_training.json"
    """Json file to write."""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows = 2000
            self.steps = 2
            self.rounds = 1
        if self.steps * self.batch_size > self.rows:
            raise InputError(
                f"--steps {self.steps}: {self.rows} rows do not give so many batches of {self.batch_size}"
            )


class Contest:
    """The table and the initial weights, and every rival that trains from them."""

    def __init__(self, settings: FusionTrainingSettings):
        import torch

        from fusion.all_embeddings.config import AllEmbeddingsSettings
        from fusion.all_embeddings.model import AllEmbeddings
        from studies.benchmarks.fusion_rivals import WIDTHS, RowDicts, random_table

        self.settings = settings
        table = random_table(settings.rows)
        self.row_dicts = RowDicts(table)
        self.log_price = table.log_price
        self.table = table.to(torch.device(settings.device))
        steps_per_epoch = -(-settings.rows // settings.batch_size)
        self.steps = settings.steps if settings.device == "cpu" else steps_per_epoch
        # what an epoch prepares is counted for the steps that are measured; their rows lie all over the table
        self.fit = torch.randperm(settings.rows)[: self.steps * settings.batch_size]
        torch.manual_seed(0)
        self.initial = AllEmbeddings(AllEmbeddingsSettings(), WIDTHS)

    def model_and_target(self, compiled: bool = False) -> tuple[nn.Module, Target]:
        """A model with the initial weights, ready to train."""
        from fusion.all_embeddings.config import AllEmbeddingsSettings
        from fusion.target import Target

        training = AllEmbeddingsSettings(
            batch_size=self.settings.batch_size, device=self.settings.device, compile=compiled
        )
        target = Target.of(training, self.log_price)
        model = copy.deepcopy(self.initial)
        model.set_output_bias(target.output_bias)
        return model.to(self.settings.device).train(), target

    def ours(self, compiled: bool = False) -> Callable[[], object]:
        """A round of our own training."""
        from fusion.loop import epoch_rows, train_epoch
        from fusion.step import TrainingStep

        model, target = self.model_and_target(compiled)
        step = TrainingStep(model, self.table, target, target.settings)

        def round_of_steps() -> float:
            rows, visible = epoch_rows(self.table, self.fit, target.settings, epoch=1)
            return train_epoch(step, rows, visible).item()

        return round_of_steps

    def rival(self, make: Callable, *, plain_layers: bool = False) -> Callable[[int], object]:
        """train(steps) of a rival from `fusion_rivals`."""
        from studies.benchmarks.fusion_rivals import ModelWithLoss, with_plain_layers

        model, target = self.model_and_target()
        if plain_layers:
            model = with_plain_layers(model)
        with_loss = ModelWithLoss(model, target)
        return make(with_loss, self.row_dicts, target, self.settings.device, self.settings.workers)

    def flop_per_step(self) -> int:
        """FLOP of the matrix products that one step of ours runs, forward and backward."""
        from torch.utils.flop_counter import FlopCounterMode

        from fusion.step import TrainingStep

        model, target = self.model_and_target()
        step = TrainingStep(model, self.table, target, target.settings)
        rows = self.fit[: self.settings.batch_size].to(self.settings.device)
        visible = self.table.valid[: self.settings.batch_size]
        with FlopCounterMode(display=False) as counter:
            step(rows, visible)
        return counter.get_total_flops()


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(FusionTrainingSettings, argv, description=__doc__.split("\n")[0])
    import torch

    from studies.benchmarks import measure
    from studies.benchmarks.fusion_rivals import loop_steps, trainer_steps

    contest = Contest(settings)
    steps = contest.steps
    trainer = contest.rival(trainer_steps)
    plain_trainer = contest.rival(trainer_steps, plain_layers=True)
    loop = contest.rival(loop_steps)
    plain_loop = contest.rival(loop_steps, plain_layers=True)
    rivals = {"ours": contest.ours()}
    if settings.compile:
        rivals["ours compiled"] = contest.ours(compiled=True)
    rivals |= {
        "Trainer": lambda: trainer(steps + 1),
        "Trainer, plain layers": lambda: plain_trainer(steps + 1),
        "Trainer's start": lambda: trainer(1),
        "DataLoader loop": lambda: loop(steps),
        "DataLoader loop, plain layers": lambda: plain_loop(steps),
    }
    times = measure.interleave(rivals, rounds=settings.rounds)
    start = times.pop("Trainer's start")
    for name in ("Trainer", "Trainer, plain layers"):
        times[name] = {kind: seconds - start[kind] for kind, seconds in times[name].items()}

    flop = contest.flop_per_step()
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    gemm_rate = measure.gemm_rate(settings.device, dtype)
    is_graph = settings.compile and settings.device == "cuda"
    reference = times["ours compiled" if is_graph else "ours"]["median"]
    rows = []
    for name, seconds in times.items():
        step_seconds = seconds["median"] / steps
        rows.append(
            {
                "rival": name,
                "seconds_per_epoch": step_seconds * settings.rows / settings.batch_size,
                "ms_per_step": 1000 * step_seconds,
                "best_ms_per_step": 1000 * seconds["best"] / steps,
                "ours_is_faster_by": seconds["median"] / reference,
                "gflop_per_step": flop / 1e9,
                "share_of_gemm_rate": flop / step_seconds / gemm_rate,
            }
        )
    measure.report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
