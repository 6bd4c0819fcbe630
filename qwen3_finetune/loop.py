"""The training loop: epochs, updates over one or many devices, checkpoints, and the score that chooses the epoch.

Legend: N training rows, B batch, D_in width of the encoder.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from contracts.smape import smape
from qwen3_finetune.backbone import load_tokenizer
from qwen3_finetune.config import QwenSettings, choose_tokens_per_batch
from qwen3_finetune.data import TextInputs, TextRows, Tokenize, train_tokenizer, training_batches
from qwen3_finetune.model import PriceModel, build_model, encode
from qwen3_finetune.spec import EncoderSpec
from training.best_weights import BestWeights
from training.run_folder import Diverged, RunFolder, require_finite
from training.schedule import learning_rate_factor
from training.smape_loss import huber_smape
from training.stopping import StopRequest, stop_on_sigterm

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    """updates of the weights so far"""
    epoch: int = 0
    """finished epochs"""
    update: int = 0
    """updates in the current epoch"""
    loss_sum: float = 0.0
    """of the updates in the current epoch"""


class Training:
    """One run from its first or its last checkpointed update to its best epoch."""

    def __init__(
        self,
        settings: QwenSettings,
        spec: EncoderSpec,
        accelerator: Accelerator,
        run: RunFolder,
        rows: TextRows,
    ):
        self.settings = settings
        self.accelerator = accelerator
        self.run = run
        self.dtype = spec.dtype
        self.tokens_per_batch = choose_tokens_per_batch(settings.tokens_per_batch, accelerator.device.type)
        assert rows.log_price is not None
        self.log_price = rows.log_price
        self.fit_rows = rows.of_folds(settings.roles.fit)
        self.stop_rows = rows.of_folds(settings.roles.stop)

        fit_texts = [rows.texts[row] for row in self.fit_rows]
        tokenizer = build_tokenizer(spec, fit_texts, run, accelerator)
        model = build_model(
            spec,
            accelerator.device,
            len(tokenizer),
            head_hidden=settings.head_hidden,
            head_dropout=settings.head_dropout,
            token_dropout=settings.token_dropout,
            seed=settings.seed,
        )
        model.head.fit_statistics(
            torch.from_numpy(rows.structural[self.fit_rows]),
            torch.from_numpy(self.log_price[self.fit_rows]),
        )
        optimizer = build_optimizer(
            model, lr=settings.lr, head_lr=settings.head_lr, weight_decay=settings.weight_decay
        )
        self.best = BestWeights(model.trainable())
        self.progress = Progress()
        if settings.resume:
            self.restore(optimizer)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

        tokenize = Tokenize.of(tokenizer, spec)
        self.inputs = TextInputs(tokenize, rows.texts, rows.structural, padding_side=spec.padding_side)
        if settings.train == "head":
            self.inputs.features = self.frozen_features()

    def fit(self) -> None:
        """Train until the epochs or the patience run out, and leave the weights of the best epoch in the model."""
        with stop_on_sigterm(self.accelerator.device) as stop:
            try:
                while not self.finished():
                    start = time.perf_counter()
                    train_loss = self.train_epoch(stop)
                    stop_smape = self.smape_of(self.stop_rows)
                    self.progress.epoch += 1
                    self.progress.update = 0
                    self.progress.loss_sum = 0.0
                    self.best.offer(stop_smape, self.progress.epoch)
                    if self.accelerator.is_main_process:
                        self.finish_epoch(train_loss, stop_smape, time.perf_counter() - start)
            except Diverged as error:
                self.best.survive(error)
        self.best.load()

    def finished(self) -> bool:
        """Whether the epochs or the patience have run out."""
        epoch = self.progress.epoch
        epochs_without_gain = epoch - self.best.epoch
        return epoch >= self.settings.epochs or epochs_without_gain >= self.settings.patience

    def finish_epoch(self, train_loss: float, stop_smape: float, seconds: float) -> None:
        """Log the epoch and save a checkpoint."""
        epoch = self.progress.epoch
        self.run.log(
            self.progress.step,
            epoch=epoch,
            seconds=round(seconds, 1),
            **{"train/loss": train_loss, "stop/smape": stop_smape},
        )
        print(f"epoch {epoch}: train/loss {train_loss:.4f}  stop/smape {stop_smape:.2f}  {seconds:.0f} s")
        self.save_checkpoint()

    def train_epoch(self, stop: StopRequest) -> float:
        """Make the updates that the current epoch still lacks. Returns the mean loss of all its updates."""
        settings = self.settings
        progress = self.progress
        batches = self.batches_of_this_device(progress.epoch)
        per_update = settings.gradient_accumulation_steps
        updates = math.ceil(len(batches) / per_update)
        remaining = batches[progress.update * per_update :]
        loader = iter(self.loader(remaining))
        self.model.train()
        with tqdm(
            total=updates,
            initial=progress.update,
            desc=f"epoch {progress.epoch + 1}",
            unit="update",
            leave=False,
            disable=not self.accelerator.is_main_process,
        ) as bar:
            for start in range(0, len(remaining), per_update):
                n_batches = min(per_update, len(remaining) - start)  # the last update may have fewer
                loss = self.update(loader, n_batches, total=settings.epochs * updates)
                progress.step += 1
                progress.update += 1
                progress.loss_sum += loss
                bar.update()
                bar.set_postfix(loss=f"{progress.loss_sum / progress.update:.4f}")
                stops = stop()
                if (stops or progress.step % settings.save_steps == 0) and self.accelerator.is_main_process:
                    self.save_checkpoint()
                if stops:
                    self.accelerator.wait_for_everyone()
                    stop.leave()
        return progress.loss_sum / updates

    def update(self, loader: Iterator[list[torch.Tensor]], n_batches: int, *, total: int) -> float:
        """Change the weights once.

        Args:
            loader: gives the next micro-batches of this device.
            n_batches: micro-batches whose gradients are averaged.
            total: updates of the whole run, for the learning rate.

        Returns:
            The mean loss of the micro-batches.
        """
        settings = self.settings
        accelerator = self.accelerator
        step = self.progress.step
        factor = learning_rate_factor(step, total, settings.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        # dropout follows from these three numbers and from no earlier state, so a resumed run repeats it exactly
        seed = np.random.SeedSequence([settings.seed, step, accelerator.process_index]).generate_state(1)[0]
        torch.manual_seed(int(seed))

        mean_loss = 0.0
        for number in range(n_batches):
            *inputs, log_price = (tensor.to(accelerator.device, non_blocking=True) for tensor in next(loader))
            # the processes exchange gradients only after the last micro-batch
            last = number == n_batches - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                _, predicted = self.model(*inputs)
                loss = huber_smape(
                    predicted,
                    log_price,
                    huber_weight=settings.huber_weight,
                    smape_weight=settings.smape_weight,
                    delta=settings.huber_delta,
                )
                accelerator.backward(loss / n_batches)
            mean_loss += loss.item() / n_batches
        if accelerator.num_processes > 1:
            # one that found NaN alone would leave the others waiting
            of_all = torch.tensor(mean_loss, device=accelerator.device)
            mean_loss = accelerator.reduce(of_all, "mean").item()
        require_finite(mean_loss, run=settings.run, step=step)
        accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean_loss

    def batches_of_this_device(self, epoch: int) -> list[np.ndarray]:
        """The micro-batches k, k + n, k + 2n, … of an epoch for device k of n.

        Where they do not come out even, the first ones are used again: each device needs as many, or one would wait
        for the others forever.
        """
        settings = self.settings
        devices = self.accelerator.num_processes
        batches = training_batches(
            self.inputs.lengths,
            self.fit_rows,
            batch_size=settings.batch_size,
            per_update=settings.gradient_accumulation_steps * devices,
            seed=settings.seed,
            epoch=epoch,
        )
        per_device = math.ceil(len(batches) / devices)
        numbers = [number * devices + self.accelerator.process_index for number in range(per_device)]
        return [batches[number % len(batches)] for number in numbers]

    def loader(self, batches: list[np.ndarray]) -> DataLoader:
        """Gives, for each micro-batch, the inputs of the model and log_price (B,)."""

        def collate(rows: list[int]) -> tuple[torch.Tensor, ...]:
            return *self.inputs(np.array(rows)), torch.from_numpy(self.log_price[rows])

        return DataLoader(
            range(len(self.log_price)),  # type: ignore[arg-type]  # any sequence will do as a dataset
            batch_sampler=[batch.tolist() for batch in batches],
            collate_fn=collate,
            num_workers=self.settings.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def smape_of(self, rows: np.ndarray) -> float:
        """SMAPE on these rows, the same on all devices, which share the work.

        Raises InputError when the model no longer gives finite prices.
        """
        accelerator = self.accelerator
        model = accelerator.unwrap_model(self.model)
        batches = self.inputs.batches(rows, self.tokens_per_batch)
        own = batches[accelerator.process_index :: accelerator.num_processes]
        # each device fills in its own rows, and the sum over the devices has them all
        predicted = torch.zeros(len(self.log_price))
        for batch, _, log_price in encode(model, self.inputs, own, self.dtype):
            predicted[batch] = torch.from_numpy(log_price)
        log_price = accelerator.reduce(predicted.to(accelerator.device)).cpu().numpy()[rows]
        price = np.expm1(log_price)
        require_finite(
            float(price.sum()), name="a predicted price", run=self.settings.run, step=self.progress.step
        )
        return smape(np.expm1(self.log_price[rows]), price)

    def frozen_features(self) -> np.ndarray:
        """Features (N, D_in + 3) of the fit and stop rows by the frozen encoder, encoded once for all epochs."""
        model = self.accelerator.unwrap_model(self.model)
        features = np.zeros((len(self.log_price), model.width), np.float32)
        used = np.concatenate([self.fit_rows, self.stop_rows])
        batches = self.inputs.batches(used, self.tokens_per_batch)
        for rows, encoded, _ in encode(model, self.inputs, batches, self.dtype):
            features[rows] = encoded
        return features

    def save_checkpoint(self) -> None:
        """Write everything that `restore` reads."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "best": self.best.state(),
        }
        self.run.save_checkpoint(self.progress.step, self.best.tensors(), state)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Continue from the newest complete checkpoint, if there is one.

        Raises InputError for a checkpoint of an older version.
        """
        checkpoint = self.run.newest_checkpoint()
        if checkpoint is None:
            return
        weights, state = checkpoint
        self.best.restore(weights, state.get("best", {}))
        optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.accelerator.print(f"resuming after update {self.progress.step}")


def build_optimizer(
    model: PriceModel, *, lr: float, head_lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over the head and what is trained of the encoder, each with its own peak learning rate."""
    groups = [{"params": list(model.head.parameters()), "peak_lr": head_lr}]
    encoder = [weight for weight in model.encoder.parameters() if weight.requires_grad]
    if encoder:
        groups.append({"params": encoder, "peak_lr": lr})
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


def build_tokenizer(
    spec: EncoderSpec, fit_texts: list[str], run: RunFolder, accelerator: Accelerator
) -> PreTrainedTokenizerBase:
    """The tokenizer of the spec; if it names none, one that is learnt from the fit texts and kept in the run folder."""
    source = spec.tokenizer_source(run.path)
    if not spec.tokenizer:
        if accelerator.is_main_process:
            train_tokenizer(fit_texts, spec.config.vocab_size).save_pretrained(source)
        accelerator.wait_for_everyone()
    return load_tokenizer(source)
