"""The loss of the models that are trained by gradient descent: the metric itself."""

from __future__ import annotations

from torch import Tensor

from training.smape_loss import smape_of_ln

MAX_SMAPE = 200
"""Percent. Divided by it, the loss lies between 0 and 1, the size for which the learning rates were chosen."""


def smape_fraction(ln_difference: Tensor) -> Tensor:
    """Mean SMAPE as a fraction of its range, a scalar, from ln p − ln a of each row."""
    return smape_of_ln(ln_difference).mean() / MAX_SMAPE
