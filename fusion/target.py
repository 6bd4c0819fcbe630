"""What a model's output means: the price that it stands for, and the loss on it.

Legend: B batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion.blocks import FusionOutput
from fusion.config import TrainingSettings
from fusion.loss_functions import LOSSES
from training.smape_loss import MIN_LOG_PRICE

LOG_15_DOLLARS = math.log1p(15.0)


@dataclass
class Target:
    """How the settings and the fitted rows define the model's output."""

    settings: TrainingSettings
    mean_log_price: float
    """mean log1p(price) of the rows to fit"""
    mean_price: float
    """their mean price in dollars"""

    @classmethod
    def of(cls, settings: TrainingSettings, log_price: Tensor) -> Target:
        """The target for a model that is fitted on rows of these log1p(price)."""
        return cls(settings, log_price.mean().item(), log_price.expm1().mean().item())

    @property
    def output_bias(self) -> float:
        """Where the model's output should start: at the mean of the rows to fit."""
        return self.mean_log_price if self.settings.target == "log_price" else 1.0

    def log_price(self, output: FusionOutput) -> Tensor:
        """(B,) log1p(price) from the output, at least one cent."""
        predicted = output.log_price
        if self.settings.target == "price":
            predicted = torch.log1p((predicted * self.mean_price).clamp(min=0))
        return predicted.clamp(min=MIN_LOG_PRICE)

    def output_of(self, log_price: Tensor) -> FusionOutput:
        """The output that stands for log1p(price) (B,): what `log_price` turns back into it."""
        if self.settings.target == "price":
            return FusionOutput(log_price.expm1() / self.mean_price)
        return FusionOutput(log_price)

    def loss(self, output: FusionOutput, log_price: Tensor) -> Tensor:
        """The training loss, a scalar, of the output for rows of true log1p(price) `log_price` (B,)."""
        if self.settings.target == "price":
            return F.huber_loss(output.log_price, log_price.expm1() / self.mean_price)
        loss = LOSSES[self.settings.loss](output.log_price, log_price)
        if output.under_15_logit is not None:
            is_under = (log_price < LOG_15_DOLLARS).float()
            cross_entropy = F.binary_cross_entropy_with_logits(output.under_15_logit, is_under)
            loss = loss + self.settings.under_15_weight * cross_entropy
        return loss
