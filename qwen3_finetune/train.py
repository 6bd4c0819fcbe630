"""Fine-tune a text encoder and a regression head, end to end, on log price.

    python -m qwen3_finetune.train                          # Qwen3-Embedding-0.6B, QLoRA, one GPU
    python -m qwen3_finetune.train --preset tiny            # demo: a small random encoder, minutes on a CPU
    python -m qwen3_finetune.train --folds 5                # out of fold: five encoders, and one of all rows for test
    torchrun --nproc_per_node=4 -m qwen3_finetune.train     # four GPUs

Fits on the hold-out's fit folds, keeps the epoch with the best SMAPE on its stop fold, and reports SMAPE on its
validation folds, which neither has seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from contracts.errors import run_entry_point
from contracts.workspace import Workspace
from qwen3_finetune.config import PRESETS, QwenSettings
from qwen3_finetune.data import TextRows, read_rows
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qwen3_finetune.loop import Training
    from qwen3_finetune.model import PriceModel


def train(settings: QwenSettings) -> None:
    from training.device import choose_device, guard_torchvision, mixed_precision

    workspace = Workspace(settings.workspace)
    rows, device = read_rows(workspace, "train"), choose_device(settings.device)
    guard_torchvision()
    from accelerate import Accelerator

    from qwen3_finetune.encoder import resolve

    accelerator = Accelerator(
        mixed_precision=mixed_precision(settings.precision, device), cpu=device.type == "cpu"
    )
    settings = resolve(settings, accelerator.device)
    whole = start_run(settings, accelerator)  # of an out-of-fold run; else that of its only part
    for part in [] if whole.complete else settings.parts():
        train_part(part, start_run(part, accelerator) if settings.folds else whole, accelerator, rows)
    if settings.folds and accelerator.is_main_process and not whole.complete:
        whole.finish(parts=[part.run for part in settings.parts()])
    accelerator.end_training()


def start_run(settings: QwenSettings, accelerator: Accelerator) -> RunFolder:
    """The main process opens the run folder, the others wait for it."""
    workspace = Workspace(settings.workspace)
    run = RunFolder(workspace.path("run", name=settings.run))
    if accelerator.is_main_process:
        run = RunFolder.start(
            run.path, settings, resume=settings.resume, report_to=settings.report_to,
            inputs=[workspace.path("prepared", split="train"), workspace.path("folds")],
        )  # fmt: skip
    accelerator.wait_for_everyone()
    if run.complete:
        accelerator.print(f"{run.path}: this run is finished")
    return run


def train_part(settings: QwenSettings, run: RunFolder, accelerator: Accelerator, rows: TextRows) -> None:
    """Train one encoder, on the rows that its hold-out leaves."""
    from qwen3_finetune.loop import Training

    if run.complete:
        return
    if settings.folds and accelerator.is_main_process:
        print(f"\n{settings.run}")
    training = Training(settings, accelerator, run, rows)
    if accelerator.is_main_process:
        describe(settings, accelerator.unwrap_model(training.model), rows)
    training.fit()
    if accelerator.is_main_process:
        finish(settings, training)
    # the last reference to a gloo group must not be the wrapped model's: its destructor can deadlock
    del training
    accelerator.free_memory()


def describe(settings: QwenSettings, model: PriceModel, rows: TextRows) -> None:
    from qwen3_finetune.encoder import lora_layers_and_weights

    if settings.random_weights:
        print("random weights: a demonstration of this stage, not a pretrained encoder")
    sizes = {role: len(rows.of_folds(folds)) for role, folds in dataclasses.asdict(settings.roles).items()}
    print(f"rows: {', '.join(f'{size} {role}' for role, size in sizes.items())}")
    trained = sum(weight.numel() for weight in model.trainable().values())
    print(
        f"{settings.model}: {settings.pooling} pooling, {settings.quantization} quantization, width {model.width}"
    )
    print(f"--train {settings.train}: {trained:,} trainable weights")
    if settings.train == "lora":
        layers, weights = lora_layers_and_weights(model.encoder)
        print(f"LoRA rank {settings.lora_rank} on {layers} linear layers: {weights:,} of them")


def finish(settings: QwenSettings, training: Training) -> None:
    """Draw the curves, mark the run complete and score the best epoch on the validation folds."""
    from qwen3_finetune.config import ApplySettings
    from qwen3_finetune.evaluate import evaluate
    from training.plots import plot_training_curves

    run, progress = training.run, training.progress
    plot_training_curves(run.path / "training_curves.png", run.metrics(), title=settings.run)
    run.finish(best_epoch=progress.best_epoch, stop_smape=progress.best_smape)
    if settings.roles.validate:
        names = [field.name for field in dataclasses.fields(ApplySettings)]
        evaluate(ApplySettings(**{name: getattr(settings, name) for name in names}))


def main(argv: Sequence[str] | None = None) -> None:
    train(parse_settings(QwenSettings, argv, description=__doc__.split("\n")[0], presets=PRESETS))


if __name__ == "__main__":
    run_entry_point(main)
