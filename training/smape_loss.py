"""SMAPE as a training loss on log1p(price), for every stage that trains: one formula, one scale, percent.

The metric sees only the ratio p/a of predicted and true price: its term 200·|p − a| / (p + a) equals
200·tanh(|ln p − ln a| / 2). That holds for positive prices alone. For p ≤ 0 the metric is flat at 200 and teaches
nothing, so a loss sees the price through a smooth floor (see `positive_price`).

Legend: B batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.smape import SMALLEST_PRICE

MIN_LOG_PRICE = math.log1p(SMALLEST_PRICE)
"""log1p of one cent: no prediction is lower."""

PRICE_FLOOR = 0.10
"""Dollars. Prices from here up are exact; the cheapest product of the reference task costs $0.13."""

_LOG_FLOOR = math.log1p(PRICE_FLOOR)
_FLOOR_STEEPNESS = (1 + PRICE_FLOOR) / PRICE_FLOOR
_LOG_CEILING = 30.0  # $1e13: float32 overflows at 88, and inf / inf is NaN


def positive_price(log_price: Tensor) -> Tensor:
    """Price in dollars, > 0 for any real `log_price` = log1p(price), of the same shape.

    From PRICE_FLOOR up it is expm1(log_price). Below, it is floor / (1 + k·(log floor − log_price)) with the k that
    keeps the slope continuous. This falls like 1/distance, so a prediction below zero still feels its gradient, which
    an exponential floor (softplus) would lose. The true price takes the same way: equal prices cost nothing.
    """
    below = F.relu(_LOG_FLOOR - log_price)
    return torch.expm1(log_price.clamp(_LOG_FLOOR, _LOG_CEILING)) / (1 + _FLOOR_STEEPNESS * below)


def ln_price(log_price: Tensor) -> Tensor:
    """Natural logarithm of `positive_price`, without forming the price: no overflow at any size.

    ln(e^x − 1) = x + ln(1 − e^−x).
    """
    above = log_price.clamp(min=_LOG_FLOOR)
    below = F.relu(_LOG_FLOOR - log_price)
    return above + torch.log(-torch.expm1(-above)) - torch.log1p(_FLOOR_STEEPNESS * below)


def smape_of_ln(ln_difference: Tensor) -> Tensor:
    """The SMAPE term in percent, 0 to 200, of each ln p − ln a; same shape. `contracts.smape` has it for numpy."""
    return 200 * torch.tanh(ln_difference.abs() / 2)


def smape_terms(predicted: Tensor, true: Tensor) -> Tensor:
    """SMAPE in percent of each row, (B,), from predicted and true log1p(price), (B,) each."""
    return smape_of_ln(ln_price(predicted) - ln_price(true))


def huber_smape(
    predicted: Tensor,
    true: Tensor,
    *,
    huber_weight: float = 1.0,
    smape_weight: float = 1.0,
    delta: float = 1.0,
) -> Tensor:
    """huber_weight · Huber + smape_weight · SMAPE/100, a scalar, from predicted and true log1p(price), (B,) each.

    Huber acts on log1p(price) and is quadratic up to an error of `delta`. Divided by 100, SMAPE is a fraction of the
    price, 0 to 2, and of the same size as Huber.
    """
    huber = F.huber_loss(predicted, true, delta=delta)
    return huber_weight * huber + smape_weight * smape_terms(predicted, true).mean() / 100
