"""Fine-tune CLIP on the catalogue's pictures and texts, with a price head on the image embedding.

    python -m clip_finetune.train --preset tiny --workspace demo
    python -m clip_finetune.train --folds 5       # out of fold: five models, and one on all rows for other tables
    torchrun --nproc_per_node 8 -m clip_finetune.train

config.py holds every setting, loop.py the training loop. --resume continues an interrupted run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_finetune.config import PRESETS, ClipSettings
from contracts.errors import run_entry_point
from contracts.smape import best_constant, smape
from contracts.workspace import Workspace
from training.plots import plot_training_curves
from training.run_folder import RunFolder
from training.settings import parse_settings
from training.trackers import require_tracker

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import Accelerator

    from clip_finetune.model import PriceClip
    from clip_finetune.pictures import Data, TrainingRows


def usable_rows(
    settings: ClipSettings, model: PriceClip, accelerator: Accelerator
) -> tuple[pd.DataFrame, TrainingRows, np.ndarray]:
    """The training table, its rows as inputs of the model, and (N,) bool which of them have a usable picture.

    Every picture is decoded once, by one of the processes.
    """
    from accelerate.utils import gather_object

    from clip_finetune.model import build_tokenizer
    from clip_finetune.pictures import TrainingRows, reasons_unusable
    from training.pictures import PictureRows

    workspace = Workspace(settings.workspace)
    table = workspace.training_table()
    folder = workspace.images_folder()
    pictures = PictureRows(table["image"], folder, model.transform(), min_side=model.side)
    rows = TrainingRows(table, pictures, build_tokenizer(settings, model))

    # process k of W checks the rows k, k + W, k + 2W, …
    number = accelerator.process_index
    processes = accelerator.num_processes
    reasons = reasons_unusable(
        pictures.names[number::processes], folder, settings.workers, quiet=not accelerator.is_main_process
    )
    usable = np.zeros(len(table), bool)
    for process, found in gather_object([(number, reasons)]):
        usable[process::processes] = [reason == "" for reason in found]
    accelerator.print(f"{usable.sum()} of {len(table)} rows have a usable picture; the others are left out")
    return table, rows, usable


def train(
    settings: ClipSettings, model: PriceClip, data: Data, run: RunFolder, accelerator: Accelerator
) -> dict[str, float] | None:
    """Leave the best epoch's weights in `model`.

    Returns:
        epoch, score and stop metrics of that epoch, or None where there is too little to train on.
    """
    from clip_finetune.loop import Training

    if len(data.fit) < 2 * accelerator.num_processes:  # one pair alone has no negative
        accelerator.print(f"{len(data.fit)} pictures to fit are too few: the initial weights are kept")
        return None
    return Training(settings, model, data, run, accelerator).fit()


def is_complete(settings: ClipSettings) -> bool:
    """Whether --resume has nothing left to do."""
    workspace = Workspace(settings.workspace)
    run = RunFolder(workspace.path("run", name=settings.run))
    return run.already_complete(settings.resume, settings, input_files(workspace))


def input_files(workspace: Workspace) -> list[Path]:
    return [workspace.path("prepared", split="train"), workspace.path("folds")]


def start_run(settings: ClipSettings, accelerator: Accelerator, report_to: str) -> RunFolder:
    """Open the run folder in the first process, while the others wait."""
    workspace = Workspace(settings.workspace)
    run = RunFolder(workspace.path("run", name=settings.run))
    if accelerator.is_main_process:
        run = RunFolder.start(
            run.path,
            settings,
            inputs=input_files(workspace),
            resume=settings.resume,
            report_to=report_to,
        )
    accelerator.wait_for_everyone()
    return run


def train_model(settings: ClipSettings, data: Data, accelerator: Accelerator) -> None:
    """Train one model on the rows that its hold-out leaves, score it on the others, and complete its run folder."""
    import torch

    from clip_finetune import evaluation
    from clip_finetune.model import build_model, save_model
    from training.device import seed_everything

    seed_everything(settings.seed)  # the same on every process, so that all start from the same weights
    model = build_model(settings)
    accelerator.print(f"{len(data.fit)} rows fit, {len(data.stop)} stop, {len(data.validate)} validate")
    if model.price_head is not None and len(data.fit):
        model.price_head.start_from(torch.from_numpy(data.rows.log_price[data.fit]))
    model.to(accelerator.device)
    run = start_run(settings, accelerator, settings.report_to)
    best = train(settings, model, data, run, accelerator)
    validate = evaluation.evaluate(model, data, data.validate, settings, accelerator)
    if accelerator.is_main_process:
        save_model(run.path, model)
        finish(run, data, trained=best is not None, best=best, validate=validate)


def finish(run: RunFolder, data: Data, **summary: Any) -> None:
    """Complete the run folder: plots, and in summary.json the scores, also of the best constant price."""
    validate = summary["validate"]
    if "smape" in validate and len(data.fit):
        price = data.table["price"].to_numpy()
        constant = np.full(len(data.validate), best_constant(price[data.fit]))
        validate["smape_of_best_constant"] = smape(price[data.validate], constant)
    if metrics := run.metrics():
        plot_training_curves(run.path / "training_curves.png", metrics, title=run.name)
    counts = {"fit": len(data.fit), "stop": len(data.stop), "validate": len(data.validate)}
    left_out = len(data.table) - sum(counts.values())
    run.finish(**summary, pictures=counts, rows_without_usable_picture=left_out)
    listed = ", ".join(f"{name} {value:.3f}" for name, value in validate.items()) or "no rows"
    print(f"{run.path}: finished; validation: {listed}")


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ClipSettings, argv, description=__doc__.split("\n")[0], presets=PRESETS)
    require_tracker(settings.report_to)
    if is_complete(settings):
        return

    from training.device import build_accelerator, choose_device, guard_torchvision

    guard_torchvision()
    from clip_finetune.model import build_model
    from clip_finetune.pictures import Data

    accelerator = build_accelerator(choose_device(settings.device), settings.precision)
    # this model only says what its inputs look like; each run starts from a model of its own
    table, rows, usable = usable_rows(settings, build_model(settings), accelerator)
    if not settings.folds:
        train_model(settings, Data.by_role(table, rows, usable, settings.roles), accelerator)
    else:
        run = start_run(settings, accelerator, report_to="none")  # its parts report
        for part in settings.parts():
            accelerator.print(f"\n{part.run}")
            if not is_complete(part):
                train_model(part, Data.by_role(table, rows, usable, part.roles), accelerator)
        if accelerator.is_main_process:
            run.finish(parts=[part.run for part in settings.parts()])
    accelerator.end_training()


if __name__ == "__main__":
    run_entry_point(main)
