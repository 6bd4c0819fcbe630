"""The training loop: epochs, updates over one or many devices, checkpoints, and the score that chooses the epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from contracts.errors import InputError
from contracts.smape import smape
from qwen3_finetune.config import QwenSettings, choose_tokens_per_batch
from qwen3_finetune.data import TextInputs, TextRows, Tokenize, train_tokenizer, training_batches
from qwen3_finetune.encoder import architecture, load_tokenizer
from qwen3_finetune.loss import price_loss
from qwen3_finetune.model import PriceModel, build_model, encode, save_model
from training.device import choose_dtype
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    """updates made"""
    epoch: int = 0
    """epochs finished"""
    update: int = 0
    """updates made in the present epoch"""
    loss_sum: float = 0.0
    """of those updates, on the first device"""
    best_smape: float = math.inf
    best_epoch: int = 0


class Training:
    """One run. After `fit` the run folder holds the weights of the best epoch."""

    def __init__(self, settings: QwenSettings, accelerator: Accelerator, run: RunFolder, rows: TextRows):
        self.settings, self.accelerator, self.run, self.log_price = settings, accelerator, run, rows.log_price
        self.fit_rows = rows.of_folds(settings.roles.fit)
        self.stop_rows = rows.of_folds(settings.roles.stop)
        self.dtype = choose_dtype(settings.precision, accelerator.device)
        self.tokens_per_batch = choose_tokens_per_batch(settings.tokens_per_batch, accelerator.device.type)

        tokenizer = build_tokenizer(settings, accelerator, run, [rows.texts[row] for row in self.fit_rows])
        model = build_model(settings, accelerator.device, len(tokenizer))
        structural, log_price = (
            torch.from_numpy(x[self.fit_rows]) for x in (rows.structural, rows.log_price)
        )
        model.head.fit_statistics(structural, log_price)
        optimizer = build_optimizer(settings, model)
        self.progress = resume(run, model, optimizer) if settings.resume else Progress()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.inputs = TextInputs(
            Tokenize.of(tokenizer, settings), rows.texts, rows.structural, padding_side=model.padding_side
        )
        if settings.train == "head":
            self.inputs.features = self.frozen_features()

    def fit(self) -> None:
        settings, progress = self.settings, self.progress
        while progress.epoch < settings.epochs and progress.epoch - progress.best_epoch < settings.patience:
            began = time.perf_counter()
            train_loss = self.train_epoch()
            stop_smape = self.smape_of(self.stop_rows)
            progress.epoch, progress.update, progress.loss_sum = progress.epoch + 1, 0, 0.0
            improved = stop_smape < progress.best_smape
            if improved:
                progress.best_smape, progress.best_epoch = stop_smape, progress.epoch
            if self.accelerator.is_main_process:
                self.finish_epoch(train_loss, stop_smape, time.perf_counter() - began, improved)

    def finish_epoch(self, train_loss: float, stop_smape: float, seconds: float, improved: bool) -> None:
        epoch, values = self.progress.epoch, {"train/loss": train_loss, "stop/smape": stop_smape}
        self.run.log(self.progress.step, epoch=epoch, seconds=round(seconds, 1), **values)
        print(f"epoch {epoch}: train/loss {train_loss:.4f}  stop/smape {stop_smape:.2f}  {seconds:.0f} s")
        if improved:
            save_model(self.accelerator.unwrap_model(self.model), self.settings, self.run.path)
        self.save_checkpoint()

    def train_epoch(self) -> float:
        """Finish the present epoch, from the update at which a resumed run stands; returns its mean loss."""
        settings, progress = self.settings, self.progress
        batches = self.batches_of_this_device(progress.epoch)
        updates = math.ceil(len(batches) / settings.grad_accum)
        loader = iter(self.loader(batches[progress.update * settings.grad_accum :]))
        self.model.train()
        with tqdm(
            total=updates, initial=progress.update, desc=f"epoch {progress.epoch + 1}", unit="update", leave=False,
            disable=not self.accelerator.is_main_process,
        ) as bar:  # fmt: skip
            while progress.update < updates:
                left = len(batches) - progress.update * settings.grad_accum
                loss = self.update(loader, min(settings.grad_accum, left), total=settings.epochs * updates)
                progress.step, progress.update = progress.step + 1, progress.update + 1
                progress.loss_sum += loss
                bar.update()
                bar.set_postfix(loss=f"{progress.loss_sum / progress.update:.4f}")
                if progress.step % settings.checkpoint_steps == 0 and self.accelerator.is_main_process:
                    self.save_checkpoint()
        return progress.loss_sum / updates

    def update(self, loader: Iterator[list[torch.Tensor]], n_batches: int, *, total: int) -> float:
        """One of `total` optimizer steps, over `n_batches` batches; returns their mean loss on this device."""
        settings, accelerator, step, mean_loss = self.settings, self.accelerator, self.progress.step, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_share(step, total, settings.warmup)
        # dropout from (seed, step, device) rather than from a running state: a resumed run repeats it exactly
        seed = np.random.SeedSequence([settings.seed, step, accelerator.process_index]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        for i in range(n_batches):
            *inputs, log_price = (tensor.to(accelerator.device, non_blocking=True) for tensor in next(loader))
            share_gradients = i == n_batches - 1
            with contextlib.nullcontext() if share_gradients else accelerator.no_sync(self.model):
                _, predicted = self.model(*inputs)
                loss = price_loss(
                    predicted, log_price, huber_weight=settings.huber_weight, smape_weight=settings.smape_weight,
                    huber_delta=settings.huber_delta,
                )  # fmt: skip
                accelerator.backward(loss / n_batches)
            mean_loss += loss.item() / n_batches
        if not math.isfinite(mean_loss):
            raise InputError(
                f"{settings.run}: the loss is {mean_loss} at step {step}; lower --lr or --head-lr"
            )
        accelerator.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean_loss

    def batches_of_this_device(self, epoch: int) -> list[np.ndarray]:
        """Every n-th batch of the epoch; wraps around so that all devices have as many and none waits for ever."""
        settings, devices = self.settings, self.accelerator.num_processes
        batches = training_batches(
            self.inputs.lengths,
            self.fit_rows,
            batch_size=settings.batch_size,
            per_update=settings.grad_accum * devices,
            seed=settings.seed,
            epoch=epoch,
        )
        each = math.ceil(len(batches) / devices)
        return [batches[(i * devices + self.accelerator.process_index) % len(batches)] for i in range(each)]

    def loader(self, batches: list[np.ndarray]):
        """DataLoader of the model's inputs and log_price (B,)."""

        def collate(rows: list[int]) -> tuple[torch.Tensor, ...]:
            return *self.inputs(np.array(rows)), torch.from_numpy(self.log_price[rows])

        return DataLoader(
            range(len(self.log_price)), batch_sampler=[batch.tolist() for batch in batches], collate_fn=collate,
            num_workers=self.settings.workers, pin_memory=self.accelerator.device.type == "cuda",
        )  # fmt: skip

    def smape_of(self, rows: np.ndarray) -> float:
        """SMAPE on these rows; the devices share the work."""
        accelerator, log_price = self.accelerator, torch.zeros(len(self.log_price))
        batches = self.inputs.batches(rows, self.tokens_per_batch)
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        for part, _, predicted in encode(accelerator.unwrap_model(self.model), self.inputs, mine, self.dtype):
            log_price[part] = torch.from_numpy(predicted)
        log_price = accelerator.reduce(log_price.to(accelerator.device)).cpu().numpy()
        return smape(np.expm1(self.log_price[rows]), np.expm1(log_price[rows]))

    def frozen_features(self) -> np.ndarray:
        """Features (N, D_in + 3) of the fit and stop rows, encoded once for all epochs."""
        model = self.accelerator.unwrap_model(self.model)
        features = np.zeros((len(self.log_price), model.width), np.float32)
        used = np.concatenate([self.fit_rows, self.stop_rows])
        batches = self.inputs.batches(used, self.tokens_per_batch)
        for part, encoded, _ in encode(model, self.inputs, batches, self.dtype):
            features[part] = encoded
        return features

    def save_checkpoint(self) -> None:
        weights = self.accelerator.unwrap_model(self.model).trainable()
        state = {"optimizer": self.optimizer.state_dict(), "progress": dataclasses.asdict(self.progress)}
        self.run.save_checkpoint(self.progress.step, weights, state)


def lr_share(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate: up in a line for `warmup` of all steps, then down a cosine to zero."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2


def build_optimizer(settings: QwenSettings, model: PriceModel) -> torch.optim.Optimizer:
    groups = [{"params": list(model.head.parameters()), "peak_lr": settings.head_lr}]
    encoder = [weight for weight in model.encoder.parameters() if weight.requires_grad]
    groups += [{"params": encoder, "peak_lr": settings.lr}] if encoder else []
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def resume(run: RunFolder, model: PriceModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Load the newest checkpoint, if there is one, into model and optimizer."""
    if (checkpoint := run.newest_checkpoint()) is None:
        return Progress()
    weights, state = checkpoint
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            parameter.copy_(weights[name])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def build_tokenizer(settings: QwenSettings, accelerator: Accelerator, run: RunFolder, fit_texts: list[str]):
    """The model's tokenizer; for random weights one that is trained on the fit rows and kept in the run folder."""
    if settings.tokenizer or not settings.random_weights:
        return load_tokenizer(settings.tokenizer or settings.model)
    folder = run.path / "tokenizer"
    if accelerator.is_main_process:
        train_tokenizer(fit_texts, architecture(settings).vocab_size).save_pretrained(folder)
    accelerator.wait_for_everyone()
    return load_tokenizer(str(folder))
