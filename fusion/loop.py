"""Train a fusion model on tables that lie whole on the device, and predict with it.

Under torchrun every process takes its share of each batch; the step is the one that a single process would make.

Legend: B batch, N rows, M modalities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from contracts.smape import smape
from fusion.blocks import FusionOutput
from fusion.config import TrainingSettings
from fusion.dataset import FusionTable
from fusion.loss_functions import build_loss
from fusion.processes import dealt, from_first_process, process, sum_gradients, whole_batch
from training.run_folder import RunFolder

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


def hide_modalities(valid: Tensor, chance: float, generator: torch.Generator | None = None) -> Tensor:
    """Modality dropout: hide each valid entry of (N, M) with `chance`; a row that would lose all keeps all.

    The numbers come from `generator`, on the CPU, so every device hides the same entries.
    """
    if chance == 0:
        return valid
    kept = valid & (torch.rand(valid.shape, generator=generator) >= chance).to(valid.device)
    return torch.where(kept.any(dim=1, keepdim=True), kept, valid)


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> None:
    """nn.utils.clip_grad_norm_; on a CPU with dot products, as torch takes a tensor's norm on one thread."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients[0].device.type == "cpu":
        squares = [gradient.flatten().dot(gradient.flatten()) for gradient in gradients]
        norm = torch.stack(squares).sum().sqrt()
    else:
        norm = nn.utils.get_total_norm(gradients)
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)


class TrainingStep:
    """One step of AdamW on rows of a table that lies on the model's device.

    With `settings.compile` the model is compiled, and on CUDA the whole step is recorded as a CUDA graph: its
    hundreds of small kernels then start as one.
    """

    def __init__(self, model: nn.Module, table: FusionTable, target: Target):
        settings = target.settings
        self.settings, self.table, self.loss_function = settings, table, target.loss()
        self.device = table.valid.device
        self.log_price = table.log_price.to(self.device)
        self.parameters = list(model.parameters())
        self.model = torch.compile(model, dynamic=False) if settings.compile else model
        self.recorded = settings.compile and self.device.type == "cuda" and process()[1] == 1
        # a graph reads the learning rate where it lies: a tensor, which the scheduler changes in place
        lr = torch.tensor(settings.lr, device=self.device) if self.recorded else settings.lr
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr, weight_decay=settings.weight_decay, fused=True, capturable=self.recorded
        )
        self.replay: CudaGraph | None = CudaGraph(self.eager, settings.batch_size) if self.recorded else None
        self.use_bf16 = settings.precision == "bf16" or (
            settings.precision == "auto" and self.device.type == "cuda"
        )

    def __call__(self, rows: Tensor, visible: Tensor) -> Tensor:
        """Positions (B,) and the mask (B, M) of what the model may see of them → loss of the batch, detached."""
        return (self.replay or self.eager)(rows, visible)

    def eager(self, rows: Tensor, visible: Tensor) -> Tensor:
        rank, processes = process()
        share = slice(rank, None, processes)
        embeddings, _ = self.table.take(rows[share])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bf16):
            output = self.model(embeddings, visible[share])
        if processes > 1:
            output = whole_batch(output, share, len(rows))
        loss = self.loss_function(output, self.log_price.index_select(0, rows))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if processes > 1:
            sum_gradients(self.parameters)
        clip_gradients(self.parameters, self.settings.clip_norm)
        self.optimizer.step()
        return loss.detach()


class CudaGraph:
    """Record `step` on its fourth full batch and replay it from then on; other batch sizes run as they are."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], batch_size: int):
        self.step, self.batch_size = step, batch_size
        self.warmup, self.stream = 3, torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, rows: Tensor, visible: Tensor) -> Tensor:
        if len(rows) != self.batch_size:
            return self.step(rows, visible)
        if self.warmup:
            # real steps, in which libraries and optimizer allocate what they keep, on a stream as capture wants it
            self.warmup -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(rows, visible)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.rows, self.visible, self.graph = rows.clone(), visible.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self.step(self.rows, self.visible)
        self.rows.copy_(rows)
        self.visible.copy_(visible)
        self.graph.replay()
        return self.loss


def epoch_rows(
    table: FusionTable, fit: Tensor, settings: TrainingSettings, epoch: int
) -> tuple[Tensor, Tensor]:
    """The rows `fit` in the order of this epoch (n,), and what the model may see of each (n, M).

    All that an epoch draws comes from seed and epoch alone, so a resumed run equals an uninterrupted one and all
    processes deal the same batches. Dropout too, whose generator is seeded here; each process has its own masks.
    """
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
    device = table.valid.device
    rows = fit[torch.randperm(len(fit), generator=generator)].to(device)
    visible = hide_modalities(table.valid.index_select(0, rows), settings.modality_dropout, generator)
    torch.manual_seed(torch.randint(2**60, (), generator=generator).item() + process()[0])
    return rows, visible


def train_epoch(step: TrainingStep, rows: Tensor, visible: Tensor) -> Tensor:
    """A step for each batch of `rows`, in their order. Returns the mean loss, on the device."""
    size = step.settings.batch_size
    total = torch.zeros((), device=rows.device)
    for batch in zip(rows.split(size), visible.split(size), strict=True):
        total += step(*batch)  # stays on the device: reading it each step would wait for the step
    return total / -(-len(rows) // size)


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
    run: RunFolder | None,
) -> dict[str, float]:
    """Fit `model` on rows `fit`, keep the weights with the lowest SMAPE on rows `stop`.

    `run` is None on all processes but the first: they write nothing.
    Returns the best epoch and its score. On return the model holds the best weights.
    """
    target = Target.of(settings, table.log_price[fit])
    step = TrainingStep(model, table, target)
    optimizer = step.optimizer
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=settings.lr_patience
    )
    stop_price = table.rows["price"].to_numpy()[stop.numpy()]

    progress = {"epoch": 0, "best_epoch": 0, "best_smape": float("inf")}
    best_weights = _copy(model)
    if settings.resume and (checkpoint := from_first_process(run and run.newest_checkpoint())):
        weights, state = checkpoint
        model.load_state_dict(_named(weights, "last."))
        best_weights = {name: weight.to(step.device) for name, weight in _named(weights, "best.").items()}
        optimizer.load_state_dict(state["optimizer"])
        if step.recorded:  # a checkpoint comes back on the CPU
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"].to(step.device)
        scheduler.load_state_dict(state["scheduler"])
        progress = state["progress"]

    epochs = range(progress["epoch"] + 1, settings.epochs + 1)
    bar = tqdm(epochs, desc=settings.run, unit=" epochs", mininterval=0.5, disable=run is None)
    for epoch in bar:
        model.train()
        loss = train_epoch(step, *epoch_rows(table, fit, settings, epoch)).item()
        if run:
            run.log(epoch, **{"train/loss": loss, "lr": float(optimizer.param_groups[0]["lr"])})
        log_price = dealt(lambda rows: predict(model, table, rows, target), stop, step.device)
        price = log_price.double().expm1().numpy()
        stop_smape = from_first_process(smape(stop_price, price))  # so that all stop at the same epoch
        if run:
            run.log(epoch, **{"stop/smape": stop_smape})
        scheduler.step(stop_smape)
        progress["epoch"] = epoch
        if stop_smape < progress["best_smape"]:
            progress.update(best_smape=stop_smape, best_epoch=epoch)
            best_weights = _copy(model)
        bar.set_postfix(stop_smape=f"{stop_smape:.2f}", best=f"{progress['best_smape']:.2f}", refresh=False)
        if run and epoch % settings.checkpoint_epochs == 0:
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


def _named(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _save(run: RunFolder, model: nn.Module, best_weights: dict, optimizer, scheduler, progress: dict) -> None:
    weights = {f"last.{name}": tensor for name, tensor in model.state_dict().items()}
    weights |= {f"best.{name}": tensor for name, tensor in best_weights.items()}
    state = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "progress": dict(progress),
    }
    run.save_checkpoint(progress["epoch"], weights, state)
