"""The losses that --loss can choose, on log1p(price).

Every loss takes `predicted` and `true`, both log1p(price) of shape (B,), and returns a scalar in float32 or
better. SMAPE losses are in percent, 0 to 200, like the metric. What they have in common with other stages,
such as the smooth floor under prices near zero, is in `training.smape_loss`.

Legend: B batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.smape import PRICE_BINS
from fusion.config import LossName
from training import smape_loss
from training.smape_loss import positive_price, smape_terms

PRICE_THRESHOLDS = PRICE_BINS[1:-1]
PRICE_WEIGHTS = (10.0, 8.0, 6.0, 4.0, 2.0, 1.0)


@functools.cache
def bucket_tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Thresholds in log1p(price) and weights, made once per device: a copy to it would break a CUDA graph."""
    # float32 rounds log1p(5) to either side of the threshold. A price on it must not fall below: 1e-5 is over
    # ten roundings and far under one cent at any threshold.
    thresholds = [math.log1p(threshold) - 1e-5 for threshold in PRICE_THRESHOLDS]
    return (
        torch.tensor(thresholds, device=device, dtype=dtype),
        torch.tensor(PRICE_WEIGHTS, device=device, dtype=dtype),
    )


def price_weight(log_price: Tensor) -> Tensor:
    """Weight of each row by its true price: $0–5 10, 5–10 8, 10–30 6, 30–60 4, 60–200 2, 200+ 1.

    A price exactly on a threshold belongs to the dearer bucket: $5.00 weighs 8, $200.00 weighs 1.
    """
    thresholds, weights = bucket_tables(log_price.device, log_price.dtype)
    return weights[torch.bucketize(log_price, thresholds, right=True)]


def _prepare(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    # (B, 1) against (B,) would broadcast to (B, B) and train on nonsense without a word
    if predicted.shape != true.shape or predicted.dim() != 1:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and true {tuple(true.shape)} must both have shape (B,)"
        )
    dtype = torch.promote_types(predicted.dtype, torch.float32)  # half precision has no cents
    return predicted.to(dtype), true.to(dtype)


def smape(predicted: Tensor, true: Tensor) -> Tensor:
    """SMAPE in percent as defined, 200·|p − a| / (p + a), every row alike."""
    predicted, true = _prepare(predicted, true)
    price = positive_price(predicted)
    true_price = positive_price(true)
    return (200 * (price - true_price).abs() / (price + true_price)).mean()


def smape_tanh(predicted: Tensor, true: Tensor) -> Tensor:
    """SMAPE in percent in log space, 200·tanh(|ln p − ln a| / 2): `smape` without forming a price."""
    return smape_terms(*_prepare(predicted, true)).mean()


def weighted_smape(predicted: Tensor, true: Tensor) -> Tensor:
    """SMAPE in percent, rows weighted by their true price (see `price_weight`), cheap products most.

    The weighted sum is divided by the sum of the weights, as in F.cross_entropy.
    """
    predicted, true = _prepare(predicted, true)
    weight = price_weight(true)
    return (weight * smape_terms(predicted, true)).sum() / weight.sum()


def focal_smape(predicted: Tensor, true: Tensor, *, gamma: float = 1.0) -> Tensor:
    """SMAPE whose rows already priced well count less: 200·s^(1 + gamma), s = SMAPE/200 of the row.

    The modulating factor s^gamma follows the focal loss of Lin et al. 2017; gamma=0 is `smape_tanh`.
    """
    share = smape_terms(*_prepare(predicted, true)) / 200
    return (200 * share ** (1 + gamma)).mean()


def huber(predicted: Tensor, true: Tensor) -> Tensor:
    """Huber loss on log1p(price), quadratic up to an error of 1."""
    return F.huber_loss(*_prepare(predicted, true))


def log_l1(predicted: Tensor, true: Tensor) -> Tensor:
    """Absolute error of log1p(price)."""
    predicted, true = _prepare(predicted, true)
    return (predicted - true).abs().mean()


def huber_smape(predicted: Tensor, true: Tensor) -> Tensor:
    """Huber + SMAPE/100: SMAPE as a fraction, of the same size as Huber."""
    return smape_loss.huber_smape(*_prepare(predicted, true))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    loss.__name__: loss
    for loss in (weighted_smape, smape, smape_tanh, focal_smape, huber, log_l1, huber_smape)
}
assert tuple(LOSSES) == get_args(LossName)
