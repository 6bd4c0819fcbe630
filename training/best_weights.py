"""The weights of the best epoch, kept beside those that go on training, in memory and in every checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from contracts.errors import InputError
from training.processes import process
from training.run_folder import Diverged


class BestWeights:
    """A copy of `live` as it was at the best score so far.

    Args:
        live: tensors by name that training changes in place, such as `model.state_dict()`.
        higher_is_better: True for scores such as MRR, False for errors such as SMAPE.

    Attributes:
        score, epoch: of the copy; before the first offer the worst score there is, and epoch 0.
    """

    def __init__(self, live: dict[str, Tensor], *, higher_is_better: bool = False):
        self.live = live
        self.best = {name: tensor.detach().clone() for name, tensor in live.items()}
        self.higher_is_better = higher_is_better
        self.score = -math.inf if higher_is_better else math.inf
        self.epoch = 0

    def offer(self, score: float, epoch: int) -> bool:
        """Copy the live weights if `score` is better than any before. Returns whether it was."""
        better = score > self.score if self.higher_is_better else score < self.score
        if better:
            self.score = score
            self.epoch = epoch
            self._copy(self.live, self.best)
        return better

    def survive(self, error: Diverged) -> None:
        """Training has diverged: say so, and let the best epoch be the last. Raises `error` where there is none."""
        if self.epoch == 0:
            raise error
        if process()[0] == 0:
            print(f"{error}; training ends here, and the weights of epoch {self.epoch} are kept")

    def load(self) -> None:
        """Put the best weights into the live tensors."""
        self._copy(self.best, self.live)

    def tensors(self) -> dict[str, Tensor]:
        """Both sets for a checkpoint: `last.<name>` and `best.<name>`."""
        last = {f"last.{name}": tensor for name, tensor in self.live.items()}
        best = {f"best.{name}": tensor for name, tensor in self.best.items()}
        return last | best

    def state(self) -> dict[str, Any]:
        """Score and epoch for a checkpoint."""
        return {"score": self.score, "epoch": self.epoch}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from what `tensors` and `state` had stored. Raises InputError for a checkpoint of another form."""
        for name in self.live:
            if f"last.{name}" not in tensors or f"best.{name}" not in tensors:
                raise InputError(f"--resume: the checkpoint lacks {name}; start again without --resume")
        self._copy({name: tensors[f"last.{name}"] for name in self.live}, self.live)
        self._copy({name: tensors[f"best.{name}"] for name in self.live}, self.best)
        self.score = state["score"]
        self.epoch = state["epoch"]

    @staticmethod
    @torch.no_grad()
    def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        for name, tensor in target.items():
            tensor.copy_(source[name])
