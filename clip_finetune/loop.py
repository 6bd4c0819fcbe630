"""The training loop: epochs, steps, the best epoch, and checkpoints that a run continues from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from clip_finetune import evaluation
from clip_finetune.config import ClipSettings
from clip_finetune.loss import accumulate_backward, contrastive_loss, price_loss
from clip_finetune.model import PriceClip, parameter_groups, unfreeze
from clip_finetune.pictures import Data, epoch_steps, load_steps
from contracts.errors import InputError
from training.best_weights import BestWeights
from training.processes import reduce_gradients
from training.run_folder import Diverged, RunFolder, require_finite
from training.schedule import learning_rate_factor
from training.stopping import StopRequest, stop_on_sigterm

LARGEST_LOGIT_SCALE = math.log(100)  # CLIP's own bound on the logarithm of the factor on the cosine


@dataclass
class Position:
    """Where a run stands. Training draws nothing at random, so --resume needs only this, weights and optimizer."""

    processes: int
    epoch: int = 0
    """finished epochs"""
    step_in_epoch: int = 0
    step: int = 0
    """finished steps"""
    best_metrics: dict[str, float] = field(default_factory=dict)
    """stop metrics of the epoch whose weights are kept"""


class Training:
    """One run from its first or its last checkpointed step to its best epoch."""

    def __init__(
        self, settings: ClipSettings, model: PriceClip, data: Data, run: RunFolder, accelerator: Accelerator
    ):
        self.settings = settings
        self.model = model
        self.data = data
        self.run = run
        self.accelerator = accelerator
        self.optimizer = torch.optim.AdamW(parameter_groups(model, settings))
        self.best = BestWeights(model.state_dict())
        self.position = Position(accelerator.num_processes)
        self.total_steps = settings.epochs * len(self.steps_of(epoch=0))

    def fit(self) -> dict[str, float]:
        """Train to the last epoch and leave the weights of the best one in the model.

        Returns:
            epoch, score and stop metrics of the best epoch.
        """
        if self.settings.resume:
            self.restore()
        with stop_on_sigterm(self.accelerator.device) as stop:
            try:
                for epoch in range(self.position.epoch, self.settings.epochs):
                    self.train_epoch(epoch, stop)
                    self.finish_epoch(epoch)
            except Diverged as error:
                self.best.survive(error)
        self.best.load()
        return {"epoch": self.best.epoch, "score": self.best.score, **self.position.best_metrics}

    def steps_of(self, epoch: int) -> list[np.ndarray]:
        """The rows of each step of an epoch, for all processes together."""
        return epoch_steps(self.data.fit, self.settings, epoch, self.accelerator.num_processes)

    def train_epoch(self, epoch: int, stop: StopRequest) -> None:
        """Take the steps of one epoch that have not been taken yet, or those until `stop` asks to end."""
        settings = self.settings
        self.model.train()
        unfreeze(self.model, settings.unfreeze_blocks + epoch * settings.unfreeze_per_epoch)
        steps = self.steps_of(epoch)[self.position.step_in_epoch :]
        batches_of_steps = load_steps(self.data, steps, settings, self.accelerator)
        with tqdm(
            total=sum(map(len, steps)),
            desc=f"epoch {epoch + 1}/{settings.epochs}",
            unit="picture",
            disable=not self.accelerator.is_main_process,
        ) as progress:
            for rows, batches in zip(steps, batches_of_steps, strict=True):
                loss = self.train_step(batches)
                progress.update(len(rows))
                progress.set_postfix(loss=f"{loss:.3f}")
                if settings.checkpoint_steps and self.position.step % settings.checkpoint_steps == 0:
                    self.save_checkpoint()
                if stop():
                    self.save_checkpoint()
                    stop.leave()

    def train_step(self, batches: list[dict[str, Tensor]]) -> float:
        """Take one step over the micro-batches of this process, log it and return its loss."""
        factor = learning_rate_factor(self.position.step, self.total_steps, self.settings.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        losses = self.update(batches)
        self.position.step += 1
        self.position.step_in_epoch += 1
        # on every process: one that went on alone would wait for the others forever
        require_finite(losses["loss"], run=self.settings.run, step=self.position.step)
        if self.accelerator.is_main_process:
            logged = {f"train/{name}": value for name, value in losses.items()}
            self.run.log(self.position.step, **logged, lr=self.settings.lr * factor)
        return losses["loss"]

    def update(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Change the weights once. Returns contrastive, price (with a price head) and loss over all processes."""
        model = self.model
        device = self.accelerator.device
        log_price = torch.cat([batch["log_price"] for batch in batches]).to(device)
        losses = {}

        def encode(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            picture = batch["picture"].to(device, non_blocking=True)
            tokens = batch["tokens"].to(device, non_blocking=True)
            with self.accelerator.autocast():
                return model.encode_image(picture), model.encode_text(tokens)

        def objective(image: Tensor, text: Tensor) -> Tensor:
            losses["contrastive"] = contrastive_loss(image, text, model.clip.logit_scale.exp())
            if model.price_head is None:
                return losses["contrastive"]
            losses["price"] = price_loss(model.price_head(image), log_price, self.settings.price_loss)
            return losses["contrastive"] + self.settings.price_weight * losses["price"]

        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"] = accumulate_backward(encode, batches, objective)
        reduce_gradients(model.parameters(), "mean")
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            model.clip.logit_scale.clamp_(0, LARGEST_LOGIT_SCALE)

        own = torch.stack([loss.detach() for loss in losses.values()])
        means = self.accelerator.reduce(own, "mean").tolist()
        return dict(zip(losses, means, strict=True))

    def finish_epoch(self, epoch: int) -> None:
        """Score the epoch on the stop rows, keep its weights if they are the best so far, and save a checkpoint."""
        position = self.position
        metrics = evaluation.evaluate(self.model, self.data, self.data.stop, self.settings, self.accelerator)
        for name, value in metrics.items():  # on every process, as in each step
            require_finite(value, name=name, run=self.settings.run, step=position.step)
        # without stop rows every epoch counts as better, so the last one is kept
        score = metrics.get("smape", metrics.get("contrastive", -position.step))
        if self.best.offer(score, epoch + 1):
            position.best_metrics = metrics
        position.epoch = epoch + 1
        position.step_in_epoch = 0
        if self.accelerator.is_main_process:
            stop_metrics = {f"stop/{name}": value for name, value in metrics.items()}
            self.run.log(position.step, epoch=epoch + 1, **stop_metrics)
        self.save_checkpoint()

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

        Raises:
            InputError: it was written by another number of processes or by an older version.
        """
        checkpoint = self.run.newest_checkpoint()
        self.accelerator.wait_for_everyone()
        if checkpoint is None:
            return
        weights, state = checkpoint
        processes = state["position"]["processes"]
        if processes != self.accelerator.num_processes:
            raise InputError(
                f"--resume: {self.settings.run} was started with {processes} processes; use as many"
            )
        self.best.restore(weights, state.get("best", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = Position(**state["position"])
        self.accelerator.print(f"resuming after step {self.position.step}")
