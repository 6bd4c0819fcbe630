"""Fusion training: our step on resident tables beside Hugging Face's Trainer and the usual DataLoader loop.

    python -m studies.benchmarks.fusion_training
    python -m studies.benchmarks.fusion_training --device cuda --compile

All train the same model (variant hierarchical, 13.46 M parameters) from the same weights with the same loss, AdamW,
gradient clipping, dropout and modality dropout, batch for batch. On a CPU a round is a few steps and an epoch is
extrapolated; on CUDA a round is a whole epoch. The Trainer's start (a call with one step) is not counted. The
rivals train the model with our layers, so that only the loop differs, and, as "plain layers", with the whole of
attention, torch's own dropout, the branch's scale in front of its product and a list of experts, as one would write
it first. Shares of the product rate count the products of our form, the fewest that the model needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from contracts.errors import InputError, run_entry_point
from contracts.workspace import REPOSITORY
from training.settings import parse_settings


@dataclass
class FusionTrainingSettings:
    rows: int = 60_000
    """rows of the table, all of them trained on"""
    batch_size: int = 256
    """rows a step"""
    steps: int = 12
    """steps a round on a CPU"""
    rounds: int = 5
    """times that every rival is measured, in turns"""
    workers: int = 0
    """processes that collate batches for the rivals; on two cores they only take time from the model"""
    compile: bool = False
    """also measure our step compiled, on CUDA as a graph"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to compute"""
    quick: bool = False
    """2,000 rows, two steps, one round: does it run?"""
    out: str = str(REPOSITORY / "studies" / "results" / "fusion_training.json")
    """json file to write"""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows, self.steps, self.rounds = 2000, 2, 1
        if self.steps * self.batch_size > self.rows:
            raise InputError(f"--steps {self.steps}: {self.rows} rows are fewer batches of {self.batch_size}")


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(FusionTrainingSettings, argv, description=__doc__.split("\n")[0])
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fusion.all_embeddings.config import AllEmbeddingsSettings, build_model
    from fusion.loop import Target, TrainingStep, epoch_rows, train_epoch
    from studies.benchmarks import measure
    from studies.benchmarks.fusion_rivals import (
        WIDTHS,
        ModelWithLoss,
        RowDicts,
        loop_steps,
        random_table,
        trainer_steps,
        with_plain_layers,
    )

    table = random_table(settings.rows)
    dataset = RowDicts(table)
    on_device = table.to(torch.device(settings.device))
    in_epoch = -(-settings.rows // settings.batch_size)
    steps = settings.steps if settings.device == "cpu" else in_epoch
    # what an epoch prepares is counted for the steps that are measured; their rows lie all over the table
    fit = torch.randperm(settings.rows)[: steps * settings.batch_size]
    torch.manual_seed(0)
    initial = build_model(AllEmbeddingsSettings(), WIDTHS)

    def start(compiled: bool = False) -> tuple[torch.nn.Module, Target]:
        training = AllEmbeddingsSettings(
            batch_size=settings.batch_size, device=settings.device, compile=compiled
        )
        target = Target.of(training, table.log_price)
        model = copy.deepcopy(initial)
        model.set_output_bias(target.output_bias)
        return model.to(settings.device).train(), target

    def ours(compiled: bool = False) -> Callable[[], object]:
        model, target = start(compiled)
        step = TrainingStep(model, on_device, target)

        def work() -> object:
            return train_epoch(step, *epoch_rows(on_device, fit, target.settings, epoch=1)).item()

        return work

    def rival(make: Callable, plain: bool) -> Callable[[int], object]:
        model, target = start()
        model = ModelWithLoss(with_plain_layers(model) if plain else model, target)
        return make(model, dataset, target, settings.device, settings.workers)

    trainer, plain_trainer = (rival(trainer_steps, plain) for plain in (False, True))
    loop, plain_loop = (rival(loop_steps, plain) for plain in (False, True))
    rivals = {"ours": ours()} | ({"ours compiled": ours(compiled=True)} if settings.compile else {})
    rivals |= {
        "Trainer": lambda: trainer(steps + 1),
        "Trainer, plain layers": lambda: plain_trainer(steps + 1),
        "Trainer's start": lambda: trainer(1),
        "DataLoader loop": lambda: loop(steps),
        "DataLoader loop, plain layers": lambda: plain_loop(steps),
    }
    times = measure.interleave(rivals, rounds=settings.rounds)
    start_up = times.pop("Trainer's start")
    for name in ("Trainer", "Trainer, plain layers"):
        times[name] = {kind: times[name][kind] - start_up[kind] for kind in start_up}

    model, target = start()
    with FlopCounterMode(display=False) as counter:  # the products that run, forward and backward
        TrainingStep(model, on_device, target)(fit[: settings.batch_size].to(settings.device),
                                               on_device.valid[: settings.batch_size])  # fmt: skip
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    limit = measure.gemm_rate(settings.device, dtype)
    reference = times["ours compiled" if settings.compile and settings.device == "cuda" else "ours"]
    rows = []
    for name, seconds in times.items():
        step_seconds = seconds["median"] / steps
        rows.append({
            "rival": name,
            "seconds_per_epoch": step_seconds * settings.rows / settings.batch_size,
            "ms_per_step": 1000 * step_seconds,
            "best_ms_per_step": 1000 * seconds["best"] / steps,
            "ours_is_faster_by": seconds["median"] / reference["median"],
            "gflop_per_step": counter.get_total_flops() / 1e9,
            "share_of_gemm_rate": counter.get_total_flops() / step_seconds / limit,
        })  # fmt: skip
    measure.report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
