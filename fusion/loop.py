"""Train a fusion model on tables that lie whole on the device, and predict with it.

Legend: B batch, N rows, M modalities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from contracts.runs import RunFolder, random_state, restore_random_state
from contracts.smape import smape
from fusion.blocks import FusionOutput
from fusion.config import TrainingSettings
from fusion.dataset import FusionTable
from fusion.loss_functions import build_loss

UNDER_15 = 2.772588722239781  # log1p($15)


@dataclass
class Target:
    """What the model's first output means, and the loss on it."""

    settings: TrainingSettings
    mean_log_price: float
    mean_price: float

    @classmethod
    def of(cls, settings: TrainingSettings, log_price: Tensor) -> Target:
        return cls(settings, log_price.mean().item(), log_price.expm1().mean().item())

    @property
    def output_bias(self) -> float:
        """Where the model's output should start."""
        return self.mean_log_price if self.settings.target == "log_price" else 1.0

    def log_price(self, output: FusionOutput) -> Tensor:
        """(B,) log1p(price) from the output, at least one cent."""
        one_cent = 0.00995  # log1p(0.01)
        predicted = output.log_price.float()
        if self.settings.target == "price":
            predicted = torch.log1p((predicted * self.mean_price).clamp(min=0))
        return predicted.clamp(min=one_cent)

    def loss(self) -> Callable[[FusionOutput, Tensor], Tensor]:
        """loss(output, log_price (B,)) → scalar"""
        if self.settings.target == "price":
            return lambda output, log_price: F.huber_loss(
                output.log_price.float(), log_price.expm1() / self.mean_price
            )
        main = build_loss(self.settings.loss)

        def loss(output: FusionOutput, log_price: Tensor) -> Tensor:
            total = main(output.log_price, log_price)
            if output.under_15_logit is not None:
                is_under = (log_price < UNDER_15).float()
                cross_entropy = F.binary_cross_entropy_with_logits(output.under_15_logit.float(), is_under)
                total = total + self.settings.under_15_weight * cross_entropy
            return total

        return loss


def hide_modalities(valid: Tensor, chance: float) -> Tensor:
    """Modality dropout: hide each valid entry of (B, M) with `chance`; a row that would lose all keeps all."""
    if chance == 0:
        return valid
    kept = valid & (torch.rand(valid.shape, device=valid.device) >= chance)
    return torch.where(kept.any(dim=1, keepdim=True), kept, valid)


@torch.no_grad()
def predict(
    model: nn.Module, table: FusionTable, rows: Tensor, target: Target, batch_size: int = 4096
) -> Tensor:
    """log1p(price) of `rows` (n,) in their order, float32 on the CPU."""
    model.eval()
    rows = rows.to(table.valid.device)
    return torch.cat([target.log_price(model(*table.take(batch))) for batch in rows.split(batch_size)]).cpu()


def train(
    model: nn.Module,
    table: FusionTable,
    fit: Tensor,
    stop: Tensor,
    settings: TrainingSettings,
    run: RunFolder,
) -> dict[str, float]:
    """Fit `model` on rows `fit`, keep the weights with the lowest SMAPE on rows `stop`.

    Returns the best epoch and its score. On return the model holds the best weights.
    """
    device = table.valid.device
    log_price = table.log_price.to(device)
    target = Target.of(settings, log_price[fit.to(device)])
    loss_function = target.loss()
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=settings.lr_patience
    )
    use_bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda")
    stop_price = table.rows["price"].to_numpy()[stop.numpy()]
    fit = fit.to(device)

    progress = {"epoch": 0, "best_epoch": 0, "best_smape": float("inf")}
    best_weights = _copy(model)
    if settings.resume and (checkpoint := run.newest_checkpoint()):
        weights, state = checkpoint
        model.load_state_dict(
            {name.removeprefix("last."): w for name, w in weights.items() if name.startswith("last.")}
        )
        best_weights = {
            name.removeprefix("best."): w.to(device)
            for name, w in weights.items()
            if name.startswith("best.")
        }
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        restore_random_state(state["random"])
        progress = state["progress"]

    bar = tqdm(
        range(progress["epoch"] + 1, settings.epochs + 1), desc=run.path.name, unit=" epochs", mininterval=0.5
    )
    for epoch in bar:
        model.train()
        total = torch.zeros((), device=device)
        # the order comes from seed and epoch alone, so a resumed run sees the rows as an uninterrupted one
        order = torch.randperm(
            len(fit), generator=torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
        )
        batches = fit[order.to(device)].split(settings.batch_size)
        for rows in batches:
            embeddings, valid = table.take(rows)
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
                output = model(embeddings, hide_modalities(valid, settings.modality_dropout))
            loss = loss_function(output, log_price.index_select(0, rows))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            total += loss.detach()  # stays on the device: reading it each step would wait for the step

        run.log(epoch, **{"train/loss": total.item() / len(batches), "lr": optimizer.param_groups[0]["lr"]})
        stop_smape = smape(stop_price, predict(model, table, stop, target).double().expm1().numpy())
        run.log(epoch, **{"stop/smape": stop_smape})
        scheduler.step(stop_smape)
        progress["epoch"] = epoch
        if stop_smape < progress["best_smape"]:
            progress.update(best_smape=stop_smape, best_epoch=epoch)
            best_weights = _copy(model)
        bar.set_postfix(stop_smape=f"{stop_smape:.2f}", best=f"{progress['best_smape']:.2f}", refresh=False)
        if epoch % settings.checkpoint_epochs == 0:
            _save(run, model, best_weights, optimizer, scheduler, progress)
        if epoch - progress["best_epoch"] >= settings.patience:
            break
    bar.close()
    model.load_state_dict(best_weights)
    return {
        "epochs": progress["epoch"],
        "best_epoch": progress["best_epoch"],
        "stop_smape": progress["best_smape"],
    }


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _save(run: RunFolder, model: nn.Module, best_weights: dict, optimizer, scheduler, progress: dict) -> None:
    weights = {f"last.{name}": tensor for name, tensor in model.state_dict().items()}
    weights |= {f"best.{name}": tensor for name, tensor in best_weights.items()}
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
             "random": random_state(), "progress": dict(progress)}  # fmt: skip
    run.save_checkpoint(progress["epoch"], weights, state)
