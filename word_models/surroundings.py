"""What similar products cost, near and far: columns for a second model.

A row's surroundings are the fitted rows, weighted by a power of their similarity: a low power looks far, a high one
sees only the next of kin.

Legend: n fitted rows, m asked rows, P powers.
"""

from __future__ import annotations

import torch
from torch import Tensor

POWERS = (4, 8, 16)
COLUMNS = ("mean ln price", "ln price on the line", "deviation of ln price", "distance of the amount")
PRICES = 2  # of the COLUMNS, the first
USUAL_SLOPE = 0.35  # of ln price in the standardised amount, where the surroundings do not show one
SLOPE_PRIOR = 0.2  # variance of the amount from which on they do


def surroundings(log_similarity: Tensor, ln_price: Tensor, fit_amount: Tensor, amount: Tensor) -> Tensor:
    """(m, P, 4) the COLUMNS at each power: weighted mean of ln price; the price at the row's own amount on the weighted
    regression line of ln price in amount; weighted deviation; how far the row's amount lies from the weighted mean.

    Args:
        log_similarity: (m, n); −inf for a fitted row that must not be seen, such as the asked row itself.
        ln_price: (n,) of the fitted rows.
        fit_amount: (n,) standardised amounts of the fitted rows.
        amount: (m,) those of the asked rows.
    """
    x, y = fit_amount, ln_price
    moments = torch.stack([y, y.square(), x, x.square(), x * y], dim=1)
    found = []
    for power in POWERS:
        mean, y2, mean_amount, x2, xy = (torch.softmax(power * log_similarity, dim=1) @ moments).unbind(1)
        covariance, variance = xy - mean_amount * mean, x2 - mean_amount.square()
        slope = (covariance + USUAL_SLOPE * SLOPE_PRIOR) / (variance + SLOPE_PRIOR)
        distance = amount - mean_amount
        deviation = (y2 - mean.square()).clamp(min=0).sqrt()
        found.append(torch.stack([mean, mean + slope * distance, deviation, distance], dim=1))
    return torch.stack(found, dim=1)
