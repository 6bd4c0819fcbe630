"""Training losses on log1p(price).

Every loss takes `predicted` and `true`, both log1p(price) of shape (B,), and returns a scalar; `row_weight`
(B,), where given, weighs the rows. SMAPE losses are in percent, 0 to 200, like the metric.

The metric sees only the ratio p/a of predicted and true price: its term 200·|p − a| / (p + a) equals
200·tanh(|ln p − ln a| / 2). That holds for positive prices alone. For p ≤ 0 the metric is flat at 200 and
teaches nothing, so a loss sees the price through a smooth floor (see `positive_price`).

Legend: B batch.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.errors import InputError

PRICE_FLOOR = 0.10
"""Dollars. Prices from here up are exact; the cheapest product of the reference task costs $0.13."""

PRICE_THRESHOLDS = (5.0, 10.0, 30.0, 60.0, 200.0)
PRICE_WEIGHTS = (10.0, 8.0, 6.0, 4.0, 2.0, 1.0)

_LOG_FLOOR = math.log1p(PRICE_FLOOR)
_FLOOR_STEEPNESS = (1 + PRICE_FLOOR) / PRICE_FLOOR
_LOG_CEILING = 30.0  # $1e13: float32 overflows at 88, and inf / inf is NaN


def positive_price(log_price: Tensor) -> Tensor:
    """Price in dollars, > 0 for any real `log_price` = log1p(price), of the same shape.

    expm1(log_price) from PRICE_FLOOR up. Below, floor / (1 + k·(log floor − log_price)) with the k that keeps
    the slope continuous: it falls like 1/distance, so a prediction below zero still feels its gradient, which
    an exponential floor (softplus) would lose. The true price takes the same way: equal prices cost nothing.
    """
    below = F.relu(_LOG_FLOOR - log_price)
    return torch.expm1(log_price.clamp(_LOG_FLOOR, _LOG_CEILING)) / (1 + _FLOOR_STEEPNESS * below)


def ln_positive_price(log_price: Tensor) -> Tensor:
    """Natural logarithm of `positive_price`, without forming the price: no overflow at any size."""
    above = log_price.clamp(min=_LOG_FLOOR)
    below = F.relu(_LOG_FLOOR - log_price)
    return above + torch.log(-torch.expm1(-above)) - torch.log1p(_FLOOR_STEEPNESS * below)


@functools.cache
def _bucket_tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Thresholds in log1p(price) and weights, made once a device: a copy to it would break a CUDA graph."""
    # float32 rounds log1p(5) to either side of the threshold. A price on it must not fall below: 1e-5 is over
    # ten roundings and far under one cent at any threshold.
    thresholds = [math.log1p(t) - 1e-5 for t in PRICE_THRESHOLDS]
    return (
        torch.tensor(thresholds, device=device, dtype=dtype),
        torch.tensor(PRICE_WEIGHTS, device=device, dtype=dtype),
    )


def price_weight(log_price: Tensor) -> Tensor:
    """Weight of each row by its true price: $0–5 10, 5–10 8, 10–30 6, 30–60 4, 60–200 2, 200+ 1.

    A price exactly on a threshold belongs to the dearer bucket: $5.00 weighs 8, $200.00 weighs 1.
    """
    thresholds, weights = _bucket_tables(log_price.device, log_price.dtype)
    return weights[torch.bucketize(log_price, thresholds, right=True)]


def _prepare(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    # (B, 1) against (B,) would broadcast to (B, B) and train on nonsense without a word.
    if predicted.shape != true.shape or predicted.dim() != 1:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and true {tuple(true.shape)} must both have shape (B,)"
        )
    dtype = torch.promote_types(predicted.dtype, torch.float32)  # half precision has no cents
    return predicted.to(dtype), true.to(dtype)


def _mean(terms: Tensor, row_weight: Tensor | None) -> Tensor:
    """Mean over rows, or the weighted mean, divided by the weights' sum as in F.cross_entropy."""
    return terms.mean() if row_weight is None else (row_weight * terms).sum() / row_weight.sum()


def _smape_terms(predicted: Tensor, true: Tensor) -> Tensor:
    price, true_price = positive_price(predicted), positive_price(true)
    return 200 * (price - true_price).abs() / (price + true_price)  # (B,)


def _smape_tanh_terms(predicted: Tensor, true: Tensor) -> Tensor:
    return 200 * torch.tanh((ln_positive_price(predicted) - ln_positive_price(true)).abs() / 2)  # (B,)


def smape(predicted: Tensor, true: Tensor, *, row_weight: Tensor | None = None) -> Tensor:
    """SMAPE in percent as defined, 200·|p − a| / (p + a), every row alike."""
    return _mean(_smape_terms(*_prepare(predicted, true)), row_weight)


def smape_tanh(predicted: Tensor, true: Tensor, *, row_weight: Tensor | None = None) -> Tensor:
    """SMAPE in percent in log space, 200·tanh(|ln p − ln a| / 2): equal to `smape`, and no price is formed."""
    return _mean(_smape_tanh_terms(*_prepare(predicted, true)), row_weight)


def weighted_smape(predicted: Tensor, true: Tensor, *, row_weight: Tensor | None = None) -> Tensor:
    """SMAPE in percent, rows weighted by their true price (see `price_weight`), cheap products most."""
    predicted, true = _prepare(predicted, true)
    weight = price_weight(true)
    return _mean(_smape_tanh_terms(predicted, true), weight if row_weight is None else weight * row_weight)


def focal_smape(
    predicted: Tensor, true: Tensor, *, gamma: float = 1.0, row_weight: Tensor | None = None
) -> Tensor:
    """SMAPE whose rows already priced well count less: 200·s^(1 + gamma), s = SMAPE/200 of the row.

    The modulating factor s^gamma follows the focal loss of Lin et al. 2017; gamma=0 is `smape_tanh`.
    """
    share = _smape_tanh_terms(*_prepare(predicted, true)) / 200
    return _mean(200 * share ** (1 + gamma), row_weight)


def huber(predicted: Tensor, true: Tensor, *, delta: float = 1.0, row_weight: Tensor | None = None) -> Tensor:
    """Huber loss on log1p(price), quadratic up to an error of `delta`."""
    predicted, true = _prepare(predicted, true)
    return _mean(F.huber_loss(predicted, true, reduction="none", delta=delta), row_weight)


def log_l1(predicted: Tensor, true: Tensor, *, row_weight: Tensor | None = None) -> Tensor:
    """Absolute error of log1p(price)."""
    predicted, true = _prepare(predicted, true)
    return _mean((predicted - true).abs(), row_weight)


def huber_smape(
    predicted: Tensor,
    true: Tensor,
    *,
    huber_weight: float = 1.0,
    smape_weight: float = 1.0,
    delta: float = 1.0,
    row_weight: Tensor | None = None,
) -> Tensor:
    """huber_weight · Huber + smape_weight · SMAPE/100: SMAPE as a fraction, of the same size as Huber."""
    huber_term = huber(predicted, true, delta=delta, row_weight=row_weight)
    return huber_weight * huber_term + smape_weight * smape_tanh(predicted, true, row_weight=row_weight) / 100


LOSSES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (weighted_smape, smape, smape_tanh, focal_smape, huber, log_l1, huber_smape)
}


def build_loss(name: str, **settings: float) -> Callable[..., Tensor]:
    """The loss called `name` with its settings fixed: loss(predicted, true, row_weight=None) → scalar.

    Raises:
        InputError: no such loss, or a setting it does not have; the message lists what there is.
    """
    if name not in LOSSES:
        raise InputError(f"no loss {name!r}: choose one of {', '.join(LOSSES)}")
    known = set(inspect.signature(LOSSES[name]).parameters) - {"predicted", "true", "row_weight"}
    if unknown := sorted(set(settings) - known):
        raise InputError(
            f"loss {name!r} has no setting {', '.join(unknown)}: it has {', '.join(sorted(known)) or 'none'}"
        )
    for setting, value in settings.items():
        if value < 0 or (setting == "delta" and value == 0):
            raise InputError(f"loss setting {setting}={value} must be positive")
    return functools.partial(LOSSES[name], **settings)
