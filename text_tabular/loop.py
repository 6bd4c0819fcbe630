"""The training loop: epochs, steps, the best epoch, and checkpoints that a run continues from.

Legend: N rows, B rows of a batch, K outputs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from contracts.errors import InputError
from text_tabular.columns import Target
from text_tabular.config import TextTabularSettings
from text_tabular.data import Inputs, by_length, training_batches
from text_tabular.model import TextTabular
from training.best_weights import BestWeights
from training.processes import reduce_gradients
from training.run_folder import Diverged, RunFolder, require_finite
from training.schedule import learning_rate_factor
from training.stopping import StopRequest, stop_on_sigterm

BATCHES_TOGETHER = 4
"""A batch that is only encoded needs no activations, so it has this many times the rows of one to train on."""


@dataclass
class Position:
    """Where a run stands. The order of the rows and dropout follow from seed and step, so nothing else is kept."""

    processes: int
    epoch: int = 0
    """finished epochs"""
    step: int = 0
    """finished steps"""
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    """of the steps in the current epoch"""


class Training:
    """One model from its first or its last checkpointed step to its best epoch."""

    def __init__(
        self,
        settings: TextTabularSettings,
        model: TextTabular,
        inputs: Inputs,
        values: np.ndarray,
        target: Target,
        run: RunFolder,
        accelerator: Accelerator,
    ):
        self.settings = settings
        self.model = model
        self.inputs = inputs
        self.values = torch.from_numpy(values)
        self.target = target
        self.run = run
        self.accelerator = accelerator
        leave_out_unused(model, settings)
        if settings.fsdp:
            shard(model)
        self.optimizer = build_optimizer(model, settings)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.best = BestWeights({name: weight.data for name, weight in trained.items()})
        self.position = Position(accelerator.num_processes)
        self.class_weights: Tensor | None = None

    def fit(self, fit: np.ndarray, stop: np.ndarray, *, epochs: int) -> None:
        """Train on the rows `fit` and leave the weights of the epoch with the lowest loss on `stop` in the model.

        Without rows to stop on, as for a model of all rows, the last epoch is kept.
        """
        settings = self.settings
        self.class_weights = self._class_weights(fit)
        if settings.resume:
            self.restore()
        with stop_on_sigterm(self.accelerator.device) as request:
            try:
                while (
                    self.position.epoch < epochs and self.position.epoch - self.best.epoch < settings.patience
                ):
                    train_loss = self.train_epoch(fit, epochs, request)
                    self.finish_epoch(train_loss, stop)
            except Diverged as error:
                self.best.survive(error)
        self.best.load()

    def finish_epoch(self, train_loss: float, stop: np.ndarray) -> None:
        """Score the epoch on the rows `stop`, keep its weights if they are the best so far, and save a checkpoint."""
        position = self.position
        stop_loss = self.loss_of(stop) if len(stop) else -float(position.epoch)
        position.epoch += 1
        position.step_in_epoch = 0
        position.loss_sum = 0.0
        self.best.offer(stop_loss, position.epoch)
        if self.accelerator.is_main_process:
            logged = {"train/loss": train_loss}
            if len(stop):
                logged["stop/loss"] = stop_loss
            self.run.log(position.step, epoch=position.epoch, **logged)
            listed = ", ".join(f"{name} {value:.4f}" for name, value in logged.items())
            print(f"epoch {position.epoch}: {listed}")
        if not self.settings.fsdp:
            self.save_checkpoint()

    def _class_weights(self, fit: np.ndarray) -> Tensor | None:
        """(K,) weights by which every class counts the same over the rows to fit; None for equal rows."""
        if self.settings.class_weights == "none" or self.target.task == "regression":
            return None
        counts = np.bincount(self.values[fit].numpy(), minlength=self.target.outputs)
        weights = len(fit) / (self.target.outputs * np.maximum(counts, 1))
        return torch.tensor(weights, dtype=torch.float32, device=self.accelerator.device)

    def train_epoch(self, fit: np.ndarray, epochs: int, request: StopRequest) -> float:
        """Take the steps that the current epoch still lacks; returns the mean loss of all its steps."""
        settings = self.settings
        position = self.position
        processes = self.accelerator.num_processes
        # one batch for all processes together, of which each takes its share
        batches = training_batches(
            self.inputs.lengths, fit, settings.batch_size * processes, settings.seed * 1000 + position.epoch
        )
        self.model.train()
        with tqdm(
            batches[position.step_in_epoch :], desc=f"epoch {position.epoch + 1}", unit="step", delay=2, leave=False,
            disable=not self.accelerator.is_main_process,
        ) as progress:  # fmt: skip
            for batch in progress:
                loss = self.train_step(batch, total=epochs * len(batches))
                position.step_in_epoch += 1
                position.loss_sum += loss
                progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if request():
                    if not settings.fsdp:
                        self.save_checkpoint()
                    request.leave(saved=not settings.fsdp)
        return position.loss_sum / len(batches)

    def train_step(self, rows: np.ndarray, *, total: int) -> float:
        """Change the weights once, by the rows of all processes together; returns the loss over them."""
        settings = self.settings
        rank = self.accelerator.process_index
        processes = self.accelerator.num_processes
        factor = learning_rate_factor(self.position.step, total, settings.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        # dropout follows from these numbers and from no earlier state, so a resumed run repeats it exactly
        seed = np.random.SeedSequence([settings.seed, self.position.step, rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))

        # a last batch may have fewer rows than there are processes; the first row then stands in
        own = rows[rank::processes] if len(rows) > rank else rows[:1]
        with self.accelerator.autocast():
            output = self.model(self.inputs.batch(own).to(self.accelerator.device))
        loss = self.loss(output.float(), self.values[own].to(self.accelerator.device))
        # the mean over all rows is the mean over the processes, each weighted by its rows
        loss = loss * (len(own) * processes / max(len(rows), processes))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in trained:
            if weight.grad is None:  # a batch without any text, while another process has some
                weight.grad = torch.zeros_like(weight)
        if not settings.fsdp:
            reduce_gradients(trained, "mean")
        nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        self.optimizer.step()
        mean_loss = float(self.accelerator.reduce(loss.detach(), "mean"))
        require_finite(mean_loss, run=settings.run, step=self.position.step)
        self.position.step += 1
        return mean_loss

    def loss(self, output: Tensor, values: Tensor) -> Tensor:
        """Mean loss of B rows: cross-entropy of logits (B, K), or Huber of standardised numbers (B,)."""
        if self.target.task == "regression":
            return F.huber_loss(output, values, delta=self.settings.huber_delta)
        return F.cross_entropy(
            output, values, weight=self.class_weights, label_smoothing=self.settings.label_smoothing
        )

    def loss_of(self, rows: np.ndarray) -> float:
        """Plain loss on these rows (no class weights, no smoothing), the same on every process.

        Raises InputError when the model no longer gives finite outputs.
        """
        output = outputs_of(self.model, self.inputs, rows, self.settings.batch_size, self.accelerator)
        values = self.values[rows]
        if self.target.task == "regression":
            loss = F.huber_loss(output, values, delta=self.settings.huber_delta)
        else:
            loss = F.cross_entropy(output, values)
        require_finite(
            float(loss), name="the loss on the stop fold", run=self.settings.run, step=self.position.step
        )
        return float(loss)

    def full_weights(self) -> dict[str, Tensor]:
        """All weights by name; of a sharded model the first process gets them whole, with the others' help."""
        if not self.settings.fsdp:
            return self.model.state_dict()
        whole = {}
        for name, weight in self.model.state_dict().items():
            whole[name] = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return whole

    def save_checkpoint(self) -> None:
        """Write everything that `restore` reads; every process waits for it."""
        if self.accelerator.is_main_process:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "position": asdict(self.position),
                "best": self.best.state(),
            }
            self.run.save_checkpoint(self.position.step, self.best.tensors(), state)
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Continue from the newest complete checkpoint, if there is one.

        Raises InputError for a checkpoint of another number of processes.
        """
        checkpoint = self.run.newest_checkpoint()
        self.accelerator.wait_for_everyone()
        if checkpoint is None:
            return
        weights, state = checkpoint
        if state["position"]["processes"] != self.accelerator.num_processes:
            before = state["position"]["processes"]
            raise InputError(
                f"--resume: {self.settings.run} was started with {before} processes; use as many"
            )
        self.best.restore(weights, state["best"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = Position(**state["position"])
        self.accelerator.print(f"resuming after step {self.position.step}")


def leave_out_unused(model: TextTabular, settings: TextTabularSettings) -> None:
    """Freeze what a design of one side never reads, so that weight decay does not move it."""
    if not settings.reads_text:
        model.text.requires_grad_(False)
    if not settings.reads_fields:
        model.tabular.requires_grad_(False)


def build_optimizer(model: TextTabular, settings: TextTabularSettings) -> torch.optim.Optimizer:
    """AdamW over the encoder and over the rest, each with its own peak learning rate."""
    encoder = [] if model.encoder is None else [w for w in model.encoder.parameters() if w.requires_grad]
    in_encoder = set(map(id, encoder))
    rest = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in in_encoder]
    groups = [{"params": rest, "peak_lr": settings.head_lr}]
    if encoder:
        groups.append({"params": encoder, "peak_lr": settings.lr})
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def shard(model: TextTabular) -> None:
    """Deal weights, gradients and optimizer states to the processes (torch's FSDP2), layer by layer."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    from text_tabular.encoder import layers_of

    if not distributed.is_initialized():
        raise InputError("--fsdp: there is one process only; start several with torchrun")
    if model.encoder is not None:
        for layer in layers_of(model.encoder):
            fully_shard(layer)
    fully_shard(model)


@torch.no_grad()
def outputs_of(
    model: nn.Module,
    inputs: Inputs,
    rows: np.ndarray,
    batch_size: int,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """Outputs of the model for the rows at these positions, in their order: (n, K) or (n,) float32 on the CPU.

    Under torchrun the processes share the work, and each gets all outputs.
    """
    model.eval()
    device = next(model.parameters()).device
    rank = 0 if accelerator is None else accelerator.process_index
    processes = 1 if accelerator is None else accelerator.num_processes
    batches = list(by_length(inputs.lengths, rows, BATCHES_TOGETHER * batch_size))
    rounds = math.ceil(len(batches) / processes)
    position = {row: at for at, row in enumerate(rows.tolist())}
    outputs: Tensor | None = None
    for number in tqdm(range(rounds), desc="predict", unit="batch", delay=2, leave=False, disable=rank > 0):
        # all processes take part in every round: a sharded model cannot compute alone
        at = number * processes + rank
        batch = batches[min(at, len(batches) - 1)]
        computed = model(inputs.batch(batch).to(device)).float().cpu()
        if outputs is None:
            outputs = torch.zeros(len(rows), *computed.shape[1:])
        if at < len(batches):
            outputs[[position[row] for row in batch.tolist()]] = computed
    if outputs is None:
        raise InputError("the table has no rows to predict")
    if accelerator is not None and processes > 1:
        outputs = accelerator.reduce(outputs.to(device), "sum").cpu()
    return outputs


def average_texts(model: TextTabular, inputs: Inputs, batch_size: int, device: torch.device) -> Tensor:
    """(N, encoder width) of every row's text by an encoder that is not trained, so that one pass serves all epochs."""
    model.to(device).eval()
    averages = torch.zeros(len(inputs), model.encoder_width)
    rows = np.arange(len(inputs))
    batches = list(by_length(inputs.lengths, rows, BATCHES_TOGETHER * batch_size))
    with torch.no_grad():
        for batch in tqdm(batches, desc="encode", unit="batch", delay=2, leave=False):
            averages[torch.from_numpy(batch)] = (
                model.encode_text(inputs.batch(batch).to(device)).float().cpu()
            )
    return averages
