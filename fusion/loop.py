"""Train a fusion model on tables that lie whole on the device, and predict with it.

Under torchrun every process takes its share of each batch; the step is the one that a single process would
make.

Legend: B batch, N rows, M modalities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from contracts.errors import InputError
from contracts.smape import smape
from fusion.config import TrainingSettings
from fusion.dataset import FusionTable
from fusion.processes import dealt
from fusion.step import TrainingStep
from fusion.target import Target
from training.best_weights import BestWeights
from training.processes import from_first_process, process
from training.run_folder import Diverged, RunFolder, require_finite
from training.stopping import stop_on_sigterm


def hide_modalities(valid: Tensor, chance: float, generator: torch.Generator | None = None) -> Tensor:
    """Modality dropout: hide each valid entry of (N, M) with `chance`; a row that would lose all keeps all.

    The numbers come from `generator`, on the CPU, so every device hides the same entries.
    """
    if chance == 0:
        return valid
    drawn = torch.rand(valid.shape, generator=generator)
    kept = valid & (drawn >= chance).to(valid.device)
    return torch.where(kept.any(dim=1, keepdim=True), kept, valid)


def epoch_rows(
    table: FusionTable, fit: Tensor, settings: TrainingSettings, epoch: int
) -> tuple[Tensor, Tensor]:
    """The rows `fit` in the order of this epoch (n,), and what the model may see of each (n, M).

    All that an epoch draws comes from seed and epoch alone, so a resumed run equals an uninterrupted one and
    all processes deal the same batches. Dropout draws from torch's own generator, which is seeded here; each
    process has masks of its own.
    """
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
    order = torch.randperm(len(fit), generator=generator)
    rows = fit[order].to(table.valid.device)
    visible = hide_modalities(table.valid.index_select(0, rows), settings.modality_dropout, generator)
    dropout_seed = torch.randint(2**60, (), generator=generator).item()
    torch.manual_seed(dropout_seed + process()[0])
    return rows, visible


def train_epoch(step: TrainingStep, rows: Tensor, visible: Tensor) -> Tensor:
    """A step for each batch of `rows`, in their order. Returns the mean loss, on the device."""
    batch_size = step.settings.batch_size
    row_batches = rows.split(batch_size)
    visible_batches = visible.split(batch_size)
    total = torch.zeros((), device=rows.device)
    for batch, seen in zip(row_batches, visible_batches, strict=True):
        total += step(batch, seen)  # it stays on the device: to read it each step would wait for the step
    return total / len(row_batches)


@torch.no_grad()
def predict(
    model: nn.Module, table: FusionTable, rows: Tensor, target: Target, batch_size: int = 4096
) -> Tensor:
    """log1p(price) of `rows` (n,) in their order, float32 on the CPU."""
    model.eval()
    rows = rows.to(table.valid.device)
    predicted = []
    for batch in rows.split(batch_size):
        embeddings, valid = table.take(batch)
        predicted.append(target.log_price(model(embeddings, valid)))
    return torch.cat(predicted).cpu()


def train(
    model: nn.Module,
    table: FusionTable,
    fit: Tensor,
    stop: Tensor,
    target: Target,
    settings: TrainingSettings,
    run: RunFolder | None,
) -> dict[str, float]:
    """Fit `model` on rows `fit`, keep the weights with the lowest SMAPE on rows `stop`.

    Args:
        fit, stop: positions (n,) of rows in the table.
        run: takes metrics and checkpoints; None on all processes but the first, which write nothing.

    Returns:
        The number of epochs, the best epoch and its SMAPE. The model then holds the weights of the best
        epoch.
    """
    step = TrainingStep(model, table, target, settings)
    scheduler = ReduceLROnPlateau(step.optimizer, factor=0.5, patience=settings.lr_patience)
    best = BestWeights(model.state_dict())
    stop_price = table.rows["price"].to_numpy()[stop.numpy()]
    epoch = 0
    if settings.resume and (checkpoint := from_first_process(run and run.newest_checkpoint())):
        epoch = _restore(checkpoint, best, step, scheduler)

    bar = progress_bar(settings, total=settings.epochs, done=epoch, shown=run is not None)
    with stop_on_sigterm(step.device) as stop_request:
        while epoch < settings.epochs and epoch - best.epoch < settings.patience:
            epoch += 1
            try:
                fit_epoch(step, fit, epoch, run)
                stop_smape = score(model, table, stop, stop_price, target, settings, epoch)
            except Diverged as error:
                best.survive(error)
                break
            if run:
                run.log(epoch, epoch=epoch, **{"stop/smape": stop_smape})
            scheduler.step(stop_smape)
            best.offer(stop_smape, epoch)
            stops = stop_request()
            if run and (stops or epoch % settings.save_epochs == 0):
                run.save_checkpoint(epoch, best.tensors(), _state(epoch, best, step, scheduler))
            if stops:
                stop_request.leave()
            bar.set_postfix(stop_smape=f"{stop_smape:.2f}", best=f"{best.score:.2f}", refresh=False)
            bar.update()
    bar.close()
    best.load()
    return {"epochs": epoch, "best_epoch": best.epoch, "stop_smape": best.score}


def score(
    model: nn.Module,
    table: FusionTable,
    rows: Tensor,
    price: np.ndarray,
    target: Target,
    settings: TrainingSettings,
    epoch: int,
) -> float:
    """SMAPE of rows (n,) whose price (n,) is known, the same on all processes, which then stop at the same epoch.

    Raises Diverged when a predicted price is not finite.
    """
    log_price = dealt(lambda share: predict(model, table, share, target), rows, table.valid.device)
    predicted = log_price.double().expm1()
    require_finite(float(predicted.sum()), name="a price of the stop rows", run=settings.run, step=epoch)
    return from_first_process(smape(price, predicted.numpy()))


def train_by_schedule(
    model: nn.Module,
    table: FusionTable,
    fit: Tensor,
    target: Target,
    settings: TrainingSettings,
    run: RunFolder | None,
    learning_rates: list[float],
) -> dict[str, float]:
    """Fit `model` on rows `fit` with a known learning rate per epoch, when no row is left to stop on.

    Args:
        learning_rates: of each epoch, as `learning_rates_until_best` reads them from a validated run.

    Returns:
        The number of epochs. The model then holds the weights of the last one.
    """
    step = TrainingStep(model, table, target, settings)
    epoch = 0
    if settings.resume and (checkpoint := from_first_process(run and run.newest_checkpoint())):
        weights, state = checkpoint
        model.load_state_dict(weights)
        step.load_optimizer(state["optimizer"])
        epoch = state["epoch"]

    bar = progress_bar(settings, total=len(learning_rates), done=epoch, shown=run is not None)
    with stop_on_sigterm(step.device) as stop_request:
        while epoch < len(learning_rates):
            step.set_learning_rate(learning_rates[epoch])
            epoch += 1
            fit_epoch(step, fit, epoch, run)
            stops = stop_request()
            if run and (stops or epoch % settings.save_epochs == 0):
                state = {"epoch": epoch, "optimizer": step.optimizer.state_dict()}
                run.save_checkpoint(epoch, model.state_dict(), state)
            if stops:
                stop_request.leave()
            bar.update()
    bar.close()
    return {"epochs": epoch}


def fit_epoch(step: TrainingStep, fit: Tensor, epoch: int, run: RunFolder | None) -> None:
    """One epoch on rows `fit`; logs its mean loss and learning rate. Raises Diverged on all processes alike."""
    step.module.train()
    rows, visible = epoch_rows(step.table, fit, step.settings, epoch)
    loss = train_epoch(step, rows, visible).item()
    require_finite(loss, name="train/loss", run=step.settings.run, step=epoch)
    if run:
        lr = float(step.optimizer.param_groups[0]["lr"])
        run.log(epoch, epoch=epoch, **{"train/loss": loss, "lr": lr})


def learning_rates_until_best(metrics: list[dict[str, float]], best_epoch: int) -> list[float]:
    """The learning rate of each epoch of a run up to its best one, from what `fit_epoch` logged."""
    # runs of older versions that were interrupted early have logged their first epochs twice: the second time counts
    rates = {line["epoch"]: line["lr"] for line in metrics if "lr" in line}
    return [rates[epoch] for epoch in range(1, best_epoch + 1)]


def progress_bar(settings: TrainingSettings, *, total: int, done: int, shown: bool) -> tqdm:
    """Counts epochs."""
    return tqdm(
        total=total, initial=done, desc=settings.run, unit=" epochs", mininterval=0.5, disable=not shown
    )


def _state(epoch: int, best: BestWeights, step: TrainingStep, scheduler: ReduceLROnPlateau) -> dict[str, Any]:
    """What a checkpoint holds beside the weights. Random generators are missing: every epoch seeds them."""
    return {
        "epoch": epoch,
        "best": best.state(),
        "optimizer": step.optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


def _restore(
    checkpoint: tuple[dict[str, Tensor], dict[str, Any]],
    best: BestWeights,
    step: TrainingStep,
    scheduler: ReduceLROnPlateau,
) -> int:
    """Continue from a checkpoint. Returns the number of its epoch."""
    weights, state = checkpoint
    if "best" not in state:
        raise InputError("--resume: the checkpoint is of an older version; start again without --resume")
    best.restore(weights, state["best"])
    step.load_optimizer(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state["epoch"]
