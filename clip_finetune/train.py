"""Fine-tune CLIP on the catalogue's pictures and texts, with a price head on the image embedding.

    python -m clip_finetune.train --preset tiny --workspace demo
    torchrun --nproc_per_node 8 -m clip_finetune.train

config.py holds every setting; --resume continues an interrupted run.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from clip_finetune.config import PRESETS, ClipSettings
from contracts.errors import InputError, run_entry_point
from contracts.smape import best_constant, smape
from contracts.splits import roles
from contracts.workspace import Workspace
from training.plots import plot_training_curves
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.optim import Optimizer

    from clip_finetune.model import PriceClip
    from clip_finetune.pictures import Data


@dataclass
class Position:
    """Where a run stands; with weights and optimizer all that --resume needs, as training draws nothing at random."""

    processes: int
    epoch: int = 0
    """finished epochs"""
    step_in_epoch: int = 0
    step: int = 0
    best: dict[str, float] | None = None
    """epoch, score and stop metrics of the epoch that will be kept"""


def build_data(settings: ClipSettings, model: PriceClip, accelerator: Accelerator) -> Data:
    """Decode every picture once and deal the rows with a usable one into fit, stop and validate."""
    from accelerate.utils import gather_object

    from clip_finetune.model import build_tokenizer
    from clip_finetune.pictures import CatalogRows, Data, fold_of_each_row, reasons_unusable

    workspace, main_process = Workspace(settings.workspace), accelerator.is_main_process
    table = workspace.prepared("train")
    fold, tokenizer = fold_of_each_row(workspace, table), build_tokenizer(settings, model)
    rows = CatalogRows(table, workspace.images_folder(), model.transform(), model.side, tokenizer)

    number, processes = accelerator.process_index, accelerator.num_processes
    reasons = reasons_unusable(rows.paths[number::processes], settings.workers, quiet=not main_process)
    usable = np.zeros(len(table), bool)
    for process, found in gather_object([(number, reasons)]):
        usable[process::processes] = [reason == "" for reason in found]
    data = Data.by_role(table, rows, usable, fold, roles(settings.holdout))
    accelerator.print(
        f"{usable.sum()} of {len(table)} rows have a usable picture, the others are left out: "
        f"{len(data.fit)} fit, {len(data.stop)} stop, {len(data.validate)} validate"
    )
    return data


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear over the first `warmup` part, then half a cosine towards 0, which step total + 1 would reach."""
    rise = warmup * total
    if step < rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (total + 1 - rise)))


def train(
    settings: ClipSettings, model: PriceClip, data: Data, run: RunFolder, accelerator: Accelerator
) -> dict[str, float]:
    """Train to the last epoch and leave the best epoch's weights in `model`. Returns that epoch's stop metrics."""
    import torch
    from safetensors.torch import load_file, save_file

    from clip_finetune.evaluation import evaluate
    from clip_finetune.model import parameter_groups, unfreeze
    from clip_finetune.pictures import epoch_steps, load_steps

    main_process, processes = accelerator.is_main_process, accelerator.num_processes
    optimizer = torch.optim.AdamW(parameter_groups(model, settings))
    position = restore(settings, model, optimizer, run, accelerator)

    def checkpoint() -> None:
        if main_process:
            state = {"optimizer": optimizer.state_dict(), "position": asdict(position)}
            run.save_checkpoint(position.step, model.state_dict(), state)
        accelerator.wait_for_everyone()

    total = settings.epochs * len(epoch_steps(data.fit, settings, 0, processes))
    for epoch in range(position.epoch, settings.epochs):
        model.train()
        unfreeze(model, settings.unfreeze_blocks + epoch * settings.unfreeze_per_epoch)
        steps = epoch_steps(data.fit, settings, epoch, processes)[position.step_in_epoch :]
        title = f"epoch {epoch + 1}/{settings.epochs}"
        pictures = sum(map(len, steps))
        with tqdm(total=pictures, desc=title, unit="picture", disable=not main_process) as progress:
            for batches in load_steps(data, steps, settings, accelerator):
                position.step += 1
                position.step_in_epoch += 1
                factor = learning_rate_factor(position.step, total, settings.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                losses = train_step(settings, model, optimizer, batches, accelerator)
                if not math.isfinite(losses["train/loss"]):
                    raise InputError(
                        f"{settings.run}: the loss is {losses['train/loss']} at step {position.step}; "
                        "lower --lr or use --precision fp32"
                    )
                if main_process:
                    run.log(position.step, **losses, lr=settings.lr * factor)
                progress.update(sum(len(batch["row"]) for batch in batches) * processes)
                progress.set_postfix(loss=f"{losses['train/loss']:.3f}")
                if settings.checkpoint_steps and position.step % settings.checkpoint_steps == 0:
                    checkpoint()

        metrics = evaluate(model, data, data.stop, settings, accelerator)
        # without stop rows every epoch counts as better, so the last one is kept
        score = metrics.get("smape", metrics.get("contrastive", -position.step))
        if position.best is None or score < position.best["score"]:
            position.best = {"epoch": epoch + 1, "score": score, **metrics}
            if main_process:
                save_file(model.state_dict(), best_file(run, position))
        position.epoch, position.step_in_epoch = epoch + 1, 0
        if main_process:
            stop_metrics = {f"stop/{name}": value for name, value in metrics.items()}
            run.log(position.step, epoch=epoch + 1, **stop_metrics)
        checkpoint()
        if main_process:
            # not before the checkpoint: until it is complete, a resumed run still wants the old file
            for file in set(run.path.glob("best_*")) - {best_file(run, position)}:
                file.unlink()

    accelerator.wait_for_everyone()
    model.load_state_dict(load_file(best_file(run, position)))
    return position.best


def train_step(
    settings: ClipSettings,
    model: PriceClip,
    optimizer: Optimizer,
    batches: list[dict[str, Tensor]],
    accelerator: Accelerator,
) -> dict[str, float]:
    """One step over all `batches` of all processes. Returns the losses, averaged over the processes."""
    import torch

    from clip_finetune.loss import accumulate_backward, average_gradients, contrastive_loss, price_loss

    if not all(batch["valid"].all() for batch in batches):
        raise InputError(
            f"{settings.run}: a picture became unreadable during the run; repair it and --resume"
        )
    device = accelerator.device
    log_price = torch.cat([batch["log_price"] for batch in batches]).to(device)
    losses = {}

    def encode(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        picture, tokens = (batch[name].to(device, non_blocking=True) for name in ("picture", "tokens"))
        with accelerator.autocast():
            return model.encode_image(picture), model.encode_text(tokens)

    def objective(image: Tensor, text: Tensor) -> Tensor:
        losses["contrastive"] = loss = contrastive_loss(image, text, model.clip.logit_scale.exp())
        if model.price_head is not None:
            losses["price"] = price_loss(model.price_head(image), log_price, settings.price_loss)
            loss = loss + settings.price_weight * losses["price"]
        return loss

    optimizer.zero_grad(set_to_none=True)
    losses["loss"] = accumulate_backward(encode, batches, objective)
    average_gradients(model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    optimizer.step()
    with torch.no_grad():
        model.clip.logit_scale.clamp_(0, math.log(100))  # CLIP's own bound
    means = accelerator.reduce(torch.stack([loss.detach() for loss in losses.values()]), "mean").tolist()
    return {f"train/{name}": mean for name, mean in zip(losses, means, strict=True)}


def restore(
    settings: ClipSettings, model: PriceClip, optimizer: Optimizer, run: RunFolder, accelerator: Accelerator
) -> Position:
    """Load the newest complete checkpoint when --resume is given and there is one."""
    position = Position(accelerator.num_processes)
    checkpoint = run.newest_checkpoint() if settings.resume else None
    accelerator.wait_for_everyone()
    if checkpoint is None:
        return position
    weights, state = checkpoint
    position = Position(**state["position"])
    if position.processes != accelerator.num_processes:
        raise InputError(
            f"--resume: {settings.run} was started with {position.processes} processes; use as many"
        )
    model.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    accelerator.print(f"resuming after step {position.step}")
    return position


def best_file(run: RunFolder, position: Position) -> Path:
    return run.path / f"best_{position.best['epoch']:04d}.safetensors"


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ClipSettings, argv, description=__doc__.split("\n")[0], presets=PRESETS)

    import torch
    from accelerate import Accelerator

    from training.device import choose_device, guard_torchvision, mixed_precision, seed_everything

    guard_torchvision()
    from clip_finetune.evaluation import evaluate
    from clip_finetune.model import build_model, save_model

    workspace = Workspace(settings.workspace)
    run = RunFolder(workspace.path("run", name=settings.run))
    if settings.resume and run.complete:
        print(f"{run.path}: already finished, nothing to resume")
        return
    device = choose_device(settings.device)
    precision = mixed_precision(settings.precision, device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
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

    trained = len(data.fit) >= 2 * accelerator.num_processes  # one pair alone has no negative
    if trained:
        best = train(settings, model, data, run, accelerator)
    else:
        best = None
        accelerator.print(f"{len(data.fit)} pictures to fit are too few: the initial weights are kept")
    validate = evaluate(model, data, data.validate, settings, accelerator)
    accelerator.wait_for_everyone()  # finish removes files that the others may still be reading
    if accelerator.is_main_process:
        save_model(run.path, model)
        finish(run, data, trained=trained, best=best, validate=validate)


def finish(run: RunFolder, data: Data, **summary: Any) -> None:
    validate, price = summary["validate"], data.table["price"].to_numpy()
    if "smape" in validate and len(data.fit):
        constant = np.full(len(data.validate), best_constant(price[data.fit]))
        validate["smape_of_best_constant"] = smape(price[data.validate], constant)
    counts = {"fit": len(data.fit), "stop": len(data.stop), "validate": len(data.validate)}
    for file in run.path.glob("best_*"):
        file.unlink()
    if metrics := run.metrics():
        plot_training_curves(run.path / "training_curves.png", metrics, title=run.path.name)
    left_out = len(data.table) - sum(counts.values())
    run.finish(**summary, pictures=counts, rows_without_usable_picture=left_out)
    listed = ", ".join(f"{name} {value:.3f}" for name, value in validate.items()) or "no rows"
    print(f"{run.path}: finished; validation: {listed}")


if __name__ == "__main__":
    run_entry_point(main)
