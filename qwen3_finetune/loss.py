"""Huber on log1p(price) plus SMAPE, both from the predicted log1p(price)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LOG_PRICE = math.log1p(0.01)  # one cent: a price must stay above 0 for its ratio to exist


def ln_price(log_price: Tensor) -> Tensor:
    """ln(price) from log1p(price), by ln(e^x - 1) = x + ln(1 - e^-x): no overflow, no cancellation."""
    log_price = log_price.clamp(min=MIN_LOG_PRICE)
    return log_price + torch.log(-torch.expm1(-log_price))


def smape_loss(predicted_log_price: Tensor, log_price: Tensor) -> Tensor:
    """SMAPE / 100, range 0 to 2; scalar from (B,) and (B,).

    Uses |p - a| / ((p + a) / 2) = 2 tanh(|ln p - ln a| / 2), exact and smooth however far apart the two are.
    """
    return 2 * torch.tanh((ln_price(predicted_log_price) - ln_price(log_price)).abs() / 2).mean()


def price_loss(
    predicted_log_price: Tensor,
    log_price: Tensor,
    *,
    huber_weight: float,
    smape_weight: float,
    huber_delta: float,
) -> Tensor:
    """huber_weight · Huber(log1p prices) + smape_weight · SMAPE / 100; scalar from (B,) and (B,)."""
    huber = F.huber_loss(predicted_log_price, log_price, delta=huber_delta)
    return huber_weight * huber + smape_weight * smape_loss(predicted_log_price, log_price)
