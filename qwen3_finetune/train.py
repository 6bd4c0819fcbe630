"""Fine-tune a text encoder and a regression head, end to end, on log price.

    python -m qwen3_finetune.train                          # Qwen3-Embedding-0.6B, QLoRA, one GPU
    python -m qwen3_finetune.train --preset tiny            # demo: a small random encoder, minutes on a CPU
    python -m qwen3_finetune.train --folds 5                # out of fold: five encoders, and one on all rows for test
    torchrun --nproc_per_node=4 -m qwen3_finetune.train     # four GPUs

Fits on the fit folds of the hold-out, keeps the epoch with the best SMAPE on its stop fold, and reports the SMAPE on
its validation folds, which neither fitting nor stopping has seen. config.py holds every setting, loop.py the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from contracts.errors import run_entry_point
from contracts.workspace import Workspace
from qwen3_finetune.config import PRESETS, ApplySettings, QwenSettings
from qwen3_finetune.data import TextRows, read_rows
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qwen3_finetune.model import PriceModel
    from qwen3_finetune.spec import EncoderSpec


def train(settings: QwenSettings) -> None:
    """Train one encoder, or with --folds those of an out-of-fold run."""
    from training.device import build_accelerator, choose_device, guard_torchvision

    guard_torchvision()
    from qwen3_finetune.spec import EncoderSpec

    rows = read_rows(Workspace(settings.workspace), "train")
    accelerator = build_accelerator(choose_device(settings.device), settings.precision)
    spec = EncoderSpec.resolve(settings, accelerator.device)
    # the run folder stores what "auto" was, so that the run is read back as it was trained, on any device
    settings = dataclasses.replace(settings, quantization=spec.quantization, pooling=spec.pooling)
    if settings.folds:
        train_out_of_fold(settings, spec, rows, accelerator)
    else:
        train_encoder(settings, spec, rows, accelerator)
    accelerator.end_training()


def train_out_of_fold(
    settings: QwenSettings, spec: EncoderSpec, rows: TextRows, accelerator: Accelerator
) -> None:
    """Train one encoder per hold-out and one on all rows, each in a folder of its own inside the run folder."""
    run = start_run(settings, accelerator, report_to="none")  # its parts report
    if run is None:
        return
    for part in settings.parts():
        accelerator.print(f"\n{part.run}")
        train_encoder(part, spec, rows, accelerator)
    if accelerator.is_main_process:
        run.finish(parts=[part.run for part in settings.parts()])


def train_encoder(
    settings: QwenSettings, spec: EncoderSpec, rows: TextRows, accelerator: Accelerator
) -> None:
    """Train one encoder on the rows that its hold-out leaves, and score it on the others."""
    from qwen3_finetune.loop import Training
    from qwen3_finetune.model import save_model
    from qwen3_finetune.sentence_transformer import write_sentence_transformer

    run = start_run(settings, accelerator, settings.report_to)
    if run is None:
        return
    training = Training(settings, spec, accelerator, run, rows)
    if accelerator.is_main_process:
        describe(settings, accelerator.unwrap_model(training.model), rows)
    training.fit()
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(training.model)
        save_model(model, settings.train, run.path)
        write_sentence_transformer(run.path, spec, model.head.width)
        finish(settings, run, best_epoch=training.best.epoch, stop_smape=training.best.score)
    # the last reference to a gloo group must not be the wrapped model's: its destructor can deadlock
    del training
    accelerator.free_memory()


def start_run(settings: QwenSettings, accelerator: Accelerator, report_to: str) -> RunFolder | None:
    """Open the run folder in the first process while the others wait. None: --resume has nothing left to do."""
    workspace = Workspace(settings.workspace)
    run = RunFolder(workspace.path("run", name=settings.run))
    inputs = [workspace.path("prepared", split="train"), workspace.path("folds")]
    if run.already_complete(settings.resume, settings, inputs):
        scored = run.is_out_of_fold or (run.path / "evaluation.json").is_file()
        if accelerator.is_main_process and not scored:
            score(settings)  # the program was killed before it could
        return None
    if accelerator.is_main_process:
        run = RunFolder.start(
            run.path,
            settings,
            inputs=inputs,
            resume=settings.resume,
            report_to=report_to,
        )
    accelerator.wait_for_everyone()
    return run


def describe(settings: QwenSettings, model: PriceModel, rows: TextRows) -> None:
    """Print what is about to be trained, and on how many rows."""
    from qwen3_finetune.backbone import count_adapters

    if settings.random_weights:
        print("random weights: a demonstration of this stage, not a pretrained encoder")
    folds_by_role = dataclasses.asdict(settings.roles)
    sizes = [f"{len(rows.of_folds(folds))} {role}" for role, folds in folds_by_role.items()]
    print(f"rows: {', '.join(sizes)}")
    print(
        f"{settings.model}: {settings.pooling} pooling, {settings.quantization} quantization, width {model.width}"
    )
    trained = sum(weight.numel() for weight in model.trainable().values())
    print(f"--train {settings.train}: {trained:,} trainable weights")
    if settings.train == "lora":
        layers, weights = count_adapters(model.encoder)
        print(f"LoRA rank {settings.lora_rank} on {layers} linear layers: {weights:,} of them")


def finish(settings: QwenSettings, run: RunFolder, **summary: float) -> None:
    """Draw the curves, mark the run complete and score its best epoch on the validation folds."""
    from training.plots import plot_training_curves

    plot_training_curves(run.path / "training_curves.png", run.metrics(), title=settings.run)
    run.finish(**summary)
    score(settings)


def score(settings: QwenSettings) -> None:
    """Score a finished run on its validation folds, if there are any."""
    from qwen3_finetune.evaluate import evaluate

    if settings.roles.validate:
        shared = [field.name for field in dataclasses.fields(ApplySettings)]
        evaluate(ApplySettings(**{name: getattr(settings, name) for name in shared}))


def main(argv: Sequence[str] | None = None) -> None:
    train(parse_settings(QwenSettings, argv, description=__doc__.split("\n")[0], presets=PRESETS))


if __name__ == "__main__":
    run_entry_point(main)
