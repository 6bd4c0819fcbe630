"""Fine-tune CLIP on the catalogue's pictures and texts, with a price head on the image embedding.

    python -m clip_finetune.train --preset tiny --workspace demo
    torchrun --nproc_per_node 8 -m clip_finetune.train

config.py holds every setting, loop.py the training loop. --resume continues an interrupted run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from clip_finetune.config import PRESETS, ClipSettings
from contracts.errors import run_entry_point
from contracts.smape import best_constant, smape
from contracts.splits import roles
from contracts.workspace import Workspace
from training.plots import plot_training_curves
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from clip_finetune.model import PriceClip
    from clip_finetune.pictures import Data


def build_data(settings: ClipSettings, model: PriceClip, accelerator: Accelerator) -> Data:
    """Decode every picture once, and deal the rows with a usable one into fit, stop and validate."""
    from accelerate.utils import gather_object

    from clip_finetune.model import build_tokenizer
    from clip_finetune.pictures import Data, TrainingRows, reasons_unusable
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

    data = Data.by_role(table, rows, usable, roles(settings.holdout))
    accelerator.print(
        f"{usable.sum()} of {len(table)} rows have a usable picture, the others are left out: "
        f"{len(data.fit)} fit, {len(data.stop)} stop, {len(data.validate)} validate"
    )
    return data


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


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ClipSettings, argv, description=__doc__.split("\n")[0], presets=PRESETS)

    import torch

    from training.device import build_accelerator, choose_device, guard_torchvision, seed_everything

    guard_torchvision()
    from clip_finetune import evaluation
    from clip_finetune.model import build_model, save_model

    workspace = Workspace(settings.workspace)
    run = RunFolder(workspace.path("run", name=settings.run))
    if run.already_complete(settings.resume):
        return
    accelerator = build_accelerator(choose_device(settings.device), settings.precision)
    seed_everything(settings.seed)  # the same on every process, so that all start from the same weights
    model = build_model(settings)
    data = build_data(settings, model, accelerator)
    if model.price_head is not None and len(data.fit):
        model.price_head.start_from(torch.from_numpy(data.rows.log_price[data.fit]))
    model.to(accelerator.device)
    if accelerator.is_main_process:
        inputs = [workspace.path("prepared", split="train"), workspace.path("folds")]
        run = RunFolder.start(
            run.path, settings, inputs=inputs, resume=settings.resume, report_to=settings.report_to
        )
    accelerator.wait_for_everyone()

    best = train(settings, model, data, run, accelerator)
    validate = evaluation.evaluate(model, data, data.validate, settings, accelerator)
    if accelerator.is_main_process:
        save_model(run.path, model)
        finish(run, data, trained=best is not None, best=best, validate=validate)
    accelerator.end_training()


def finish(run: RunFolder, data: Data, **summary: Any) -> None:
    """Complete the run folder: plots, and in summary.json the scores, also of the best constant price."""
    validate = summary["validate"]
    if "smape" in validate and len(data.fit):
        price = data.table["price"].to_numpy()
        constant = np.full(len(data.validate), best_constant(price[data.fit]))
        validate["smape_of_best_constant"] = smape(price[data.validate], constant)
    if metrics := run.metrics():
        plot_training_curves(run.path / "training_curves.png", metrics, title=run.path.name)
    counts = {"fit": len(data.fit), "stop": len(data.stop), "validate": len(data.validate)}
    left_out = len(data.table) - sum(counts.values())
    run.finish(**summary, pictures=counts, rows_without_usable_picture=left_out)
    listed = ", ".join(f"{name} {value:.3f}" for name, value in validate.items()) or "no rows"
    print(f"{run.path}: finished; validation: {listed}")


if __name__ == "__main__":
    run_entry_point(main)
