"""The training loop of SFT and DPO, and their losses.

Training draws nothing at random: the adapters have no dropout, and the order of the items follows from seed and epoch.
A resumed run therefore needs weights, optimizer and the number of steps, and repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from attributes.config import TrainingSettings
from attributes.model import VisionLanguage, trained_weights
from attributes.pairs import Example, Pair
from contracts.errors import InputError
from training.processes import reduce_gradients
from training.run_folder import RunFolder, require_finite
from training.schedule import learning_rate_factor

LN_2 = math.log(2)
LN_2_TOLERANCE = 1e-3
STEADY_FALL = 1.0
"""Nats by which the preferred chains may become less probable before a steady fall is warned of."""


class Objective(Protocol):
    """What a step minimises: a sum over items, divided by the sum of their sizes."""

    items: int

    def size(self, rows: np.ndarray) -> float:
        """What the loss of these items is divided by, if nothing else is in the step."""

    def loss(self, rows: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        """Summed loss of these items, and summed metrics to log; they are divided by size and number of items."""


class Imitation:
    """SFT: the mean of −ln of the probability of every token of the replies."""

    def __init__(self, language: VisionLanguage, examples: Sequence[Example]):
        self.language = language
        self.examples = examples
        self.prompts = [language.prompt(example.question) for example in examples]
        self.items = len(examples)

    def size(self, rows: np.ndarray) -> float:
        return float(sum(len(self.examples[row].reply) for row in rows))

    def loss(self, rows: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        of_tokens, _ = self.language.log_probabilities(
            [self.prompts[row] for row in rows], [self.examples[row].reply for row in rows]
        )
        return -of_tokens.sum(), {}


@dataclass
class Reference:
    """Log-probabilities of the chains of n pairs by the frozen SFT policy, computed once."""

    preferred: Tensor
    """(n,) float32"""
    dispreferred: Tensor
    """(n,) float32"""


class Preference:
    """DPO (Rafailov et al., 2023, arXiv 2305.18290), and beside it SFT on the unanimous chains.

    Args:
        beta: inverse temperature: how firmly the policy is held to the reference.
        weights: (n,) factor on the loss of each pair.
        unanimous: chains to imitate; they are dealt out to the pairs, so that every epoch sees each of them once.
        sft_weight: factor on their loss, a mean over the tokens of one chain.
    """

    def __init__(
        self,
        language: VisionLanguage,
        pairs: Sequence[Pair],
        *,
        beta: float,
        weights: np.ndarray,
        unanimous: Sequence[Example] = (),
        sft_weight: float = 1.0,
    ):
        self.language = language
        self.pairs = pairs
        self.beta = beta
        self.weights = torch.from_numpy(weights).float()
        self.sft_weight = sft_weight
        self.prompts = [language.prompt(pair.question) for pair in pairs]
        self.items = len(pairs)
        self.reference: Reference | None = None
        self.unanimous: list[list[Example]] = [[] for _ in pairs]
        for number, example in enumerate(unanimous):
            self.unanimous[number % len(pairs)].append(example)

    def size(self, rows: np.ndarray) -> float:
        return float(len(rows))

    def chain_log_probabilities(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """(n,) and (n,): of the preferred and of the dispreferred chains, in one forward pass."""
        prompts = [self.prompts[row] for row in rows]
        preferred = [self.pairs[row].preferred.ids for row in rows]
        dispreferred = [self.pairs[row].dispreferred.ids for row in rows]
        of_tokens, _ = self.language.log_probabilities(prompts + prompts, preferred + dispreferred)
        of_chains = of_tokens.sum(dim=1)
        return of_chains[: len(rows)], of_chains[len(rows) :]

    def loss(self, rows: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        assert self.reference is not None, "compute the reference first"
        preferred, dispreferred = self.chain_log_probabilities(rows)
        index = torch.from_numpy(rows)
        gained = preferred - self.reference.preferred[index].to(preferred.device)
        lost = dispreferred - self.reference.dispreferred[index].to(preferred.device)
        of_pairs = dpo_loss(gained, lost, beta=self.beta)
        loss = (of_pairs * self.weights[index].to(of_pairs.device)).sum()
        margin = self.beta * (gained - lost).detach()
        metrics = {
            "dpo_loss": of_pairs.sum().item(),
            "reward_accuracy": (margin > 0).sum().item(),
            "reward_margin": margin.sum().item(),
            "chosen_log_probability": preferred.sum().item(),
            "rejected_log_probability": dispreferred.sum().item(),
            "chosen_gain": gained.sum().item(),
        }
        return loss + self.sft_weight * self._imitation(rows), metrics

    def _imitation(self, rows: np.ndarray) -> Tensor | float:
        examples = [example for row in rows for example in self.unanimous[row]]
        if not examples:
            return 0.0
        of_tokens, exist = self.language.log_probabilities(
            [self.language.prompt(example.question) for example in examples],
            [example.reply for example in examples],
        )
        return -(of_tokens.sum(dim=1) / exist.sum(dim=1)).sum()


def dpo_loss(gained: Tensor, lost: Tensor, *, beta: float) -> Tensor:
    """−ln σ(β (gained − lost)) of each pair.

    Args:
        gained: (n,) ln π − ln π_ref of the preferred chains.
        lost: (n,) the same of the dispreferred ones.
    """
    return -F.logsigmoid(beta * (gained - lost))


class Training:
    """One run from its first or its last checkpointed step to its last."""

    def __init__(
        self,
        settings: TrainingSettings,
        language: VisionLanguage,
        objective: Objective,
        run: RunFolder,
        accelerator: Accelerator,
        *,
        lr: float,
        steps: int,
    ):
        self.settings = settings
        self.model = language.model
        self.objective = objective
        self.run = run
        self.accelerator = accelerator
        self.lr = lr
        self.total_steps = steps
        self.trained = trained_weights(self.model)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=lr, weight_decay=settings.weight_decay)
        self.step = 0
        self.gains: list[float] = []
        """by step, how much more probable the preferred chains have become; of DPO only"""

    def rows_of_step(self, step: int) -> np.ndarray:
        """The items of one step, for all processes together."""
        per_step = steps_per_epoch(self.objective.items, self.settings, self.accelerator.num_processes)
        epoch, number = divmod(step, per_step)
        order = np.random.default_rng([self.settings.seed, epoch]).permutation(self.objective.items)
        together = self.settings.batch_size * self.accelerator.num_processes
        return order[number * together : (number + 1) * together]

    def micro_batches(self, rows: np.ndarray) -> list[np.ndarray]:
        """The share of this process in a step, as pieces that fit into memory."""
        own = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        size = self.settings.micro_batch
        return [own[start : start + size] for start in range(0, len(own), size)]

    def fit(self) -> None:
        if self.settings.resume:
            self.restore()
        self.model.eval()  # there is no dropout, and gradient checkpointing is asked for by name
        if self.settings.gradient_checkpointing:
            self.model.train()
        with tqdm(
            total=self.total_steps, initial=self.step, desc="train", unit="step", delay=2, leave=False,
            disable=not self.accelerator.is_main_process,
        ) as progress:  # fmt: skip
            while self.step < self.total_steps:
                loss = self.train_step()
                progress.update()
                progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if self.step % self.settings.checkpoint_steps == 0 and self.step < self.total_steps:
                    self.save_checkpoint()

    def train_step(self) -> float:
        """Change the weights once, by the items of all processes together; returns the loss over them."""
        factor = learning_rate_factor(self.step, self.total_steps, self.settings.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        rows = self.rows_of_step(self.step)
        size = self.objective.size(rows)
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        metrics: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for batch in self.micro_batches(rows):
            with self.accelerator.autocast():
                loss, of_batch = self.objective.loss(batch)
            loss = loss / size
            loss.backward()
            total += loss.detach()
            for name, value in of_batch.items():
                metrics[name] = metrics.get(name, 0.0) + value / len(rows)
        for weight in self.trained.values():
            if weight.grad is None:  # a last step may have fewer items than there are processes
                weight.grad = torch.zeros_like(weight)
        reduce_gradients(self.trained.values(), "sum")
        mean_loss = float(self.accelerator.reduce(total, "sum"))
        metrics = self._over_processes(metrics)
        if self.step == 0:
            require_ln_2(metrics, run=self.run.name)
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        require_finite(mean_loss, run=self.run.name, step=self.step)
        if "chosen_gain" in metrics:
            self.gains.append(metrics["chosen_gain"])
        if self.accelerator.is_main_process:
            named = {f"train/{name}": value for name, value in metrics.items()}
            self.run.log(self.step, **{"train/loss": mean_loss}, **named, lr=self.lr * factor)
        return mean_loss

    def _over_processes(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return metrics
        from accelerate.utils import gather_object

        summed: dict[str, float] = {}
        for of_process in gather_object([metrics]):
            for name, value in of_process.items():
                summed[name] = summed.get(name, 0.0) + value
        return summed

    def save_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "gains": self.gains,
                "processes": self.accelerator.num_processes,
            }
            self.run.save_checkpoint(
                self.step, {name: weight.data for name, weight in self.trained.items()}, state
            )
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def restore(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        checkpoint = self.run.newest_checkpoint()
        self.accelerator.wait_for_everyone()
        if checkpoint is None:
            return
        weights, state = checkpoint
        if state["processes"] != self.accelerator.num_processes:
            raise InputError(
                f"--resume: {self.run.name} was started with {state['processes']} processes; use as many"
            )
        for name, weight in self.trained.items():
            weight.copy_(weights[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.gains = list(state["gains"])
        self.accelerator.print(f"resuming after step {self.step}")

    @torch.no_grad()
    def compute_reference(self, objective: Preference) -> Reference:
        """What the policy, which has not been trained yet, says of all pairs.

        In the micro-batches of the first epoch: with other padding, bf16 would round otherwise, and the first loss
        would not be ln 2.
        """
        found = torch.zeros(2, objective.items, device=self.accelerator.device)
        self.model.eval()
        per_epoch = steps_per_epoch(objective.items, self.settings, self.accelerator.num_processes)
        for step in tqdm(range(per_epoch), desc="reference", unit="step", delay=2, leave=False):
            for batch in self.micro_batches(self.rows_of_step(step)):
                with self.accelerator.autocast():
                    preferred, dispreferred = objective.chain_log_probabilities(batch)
                index = torch.from_numpy(batch)
                found[0, index] = preferred
                found[1, index] = dispreferred
        found = self.accelerator.reduce(found, "sum").cpu()
        return Reference(found[0].contiguous(), found[1].contiguous())


def steps_per_epoch(items: int, settings: TrainingSettings, processes: int) -> int:
    return math.ceil(items / (settings.batch_size * processes))


def require_ln_2(metrics: dict[str, float], *, run: str) -> None:
    """Raise InputError where the first loss of DPO is not ln 2: the policy does not start from the reference."""
    first = metrics.get("dpo_loss", LN_2)
    if abs(first - LN_2) > LN_2_TOLERANCE:
        raise InputError(
            f"{run}: the first DPO loss is {first:.4f} and must be ln 2 = {LN_2:.4f}: the policy does not start from "
            "the reference; train it again without --resume"
        )


def warn_of_steady_fall(gains: Sequence[float]) -> str:
    """A sentence where the preferred chains became less probable in every quarter of the run, else ""."""
    if len(gains) < 4:
        return ""
    quarters = [float(np.mean(part)) for part in np.array_split(np.array(gains), 4)]
    falls = all(later < earlier for earlier, later in zip(quarters, quarters[1:], strict=False))
    if not falls or quarters[-1] > -STEADY_FALL:
        return ""
    return (
        f"warning: the preferred chains became steadily less probable, by {-quarters[-1]:.1f} nats in the last quarter "
        "of the run; DPO then moves probability to replies that nobody has seen. Lower --lr or raise --beta"
    )
