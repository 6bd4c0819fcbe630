"""What similar products cost, near and far: columns for a second model.

A row's surroundings are all fitted rows, weighted by a power of their similarity to the row. A low power looks far
around; a high power sees only the most similar products.

Legend: n fitted rows, m asked rows, P powers.
"""

from __future__ import annotations

import torch
from torch import Tensor

POWERS = (4, 8, 16)
"""Powers of 2, which squaring reaches much faster than an exponential."""
COLUMNS = ("mean ln price", "ln price on the line", "deviation of ln price", "distance of the amount")
PRICE_COLUMNS = slice(0, 2)
"""Those of the COLUMNS that are ln prices."""
USUAL_SLOPE = 0.35
"""Slope of ln price in the standardised amount where the surroundings do not show one."""
SLOPE_PRIOR = 0.2
"""Variance of the amount at which the surroundings' own slope counts as much as the usual one."""


def surroundings(similarity: Tensor, ln_price: Tensor, fit_amount: Tensor, amount: Tensor) -> Tensor:
    """The COLUMNS at each power, (m, P, 4).

    They are: the weighted mean of ln price; the price at the row's own amount on the weighted regression line of
    ln price in the amount; the weighted deviation of ln price; how far the row's amount lies from the weighted mean.

    Args:
        similarity: (m, n), at least 0; 0 for a fitted row that must not be seen, such as the asked row itself.
        ln_price: (n,) of the fitted rows.
        fit_amount: (n,) standardised amounts of the fitted rows.
        amount: (m,) standardised amounts of the asked rows.
    """
    moments = torch.stack(
        [ln_price, ln_price.square(), fit_amount, fit_amount.square(), fit_amount * ln_price], dim=1
    )
    # as fractions of the largest one, so that high powers do not round all of them to 0
    weight = similarity / similarity.amax(dim=1, keepdim=True)
    reached = 1
    by_power = []
    for power in POWERS:
        while reached < power:
            weight = weight.square()
            reached *= 2
        share = weight / weight.sum(dim=1, keepdim=True)  # (m, n), rows sum to 1
        mean, mean_square, mean_amount, mean_amount_square, mean_product = (share @ moments).unbind(1)
        covariance = mean_product - mean_amount * mean
        variance = mean_amount_square - mean_amount.square()
        slope = (covariance + USUAL_SLOPE * SLOPE_PRIOR) / (variance + SLOPE_PRIOR)
        distance = amount - mean_amount
        on_line = mean + slope * distance
        deviation = (mean_square - mean.square()).clamp(min=0).sqrt()  # rounding may go below 0
        by_power.append(torch.stack([mean, on_line, deviation, distance], dim=1))
    return torch.stack(by_power, dim=1)
