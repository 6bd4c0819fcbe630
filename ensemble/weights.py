"""Weights over models by SMAPE, and conformal intervals. Plain numpy on out-of-fold predictions.

Legend: N rows, J models.
"""

from __future__ import annotations

import numpy as np

from contracts.smape import smape_of_ln

USUAL_DIFFICULTY = 0.3
"""What is added to the models' disagreement, in ln price: an interval must not shrink to nothing where they agree."""


def fit_weights(ln_predicted: np.ndarray, ln_price: np.ndarray) -> np.ndarray:
    """Weights (J,), ≥ 0 and summing to 1, of the mean ln price with the lowest SMAPE.

    Args:
        ln_predicted: (N, J) natural-log prices, each from a model that has not seen the row.
        ln_price: (N,) the truth.
    """
    from scipy.optimize import minimize

    def smape_and_gradient(logits: np.ndarray) -> tuple[float, np.ndarray]:
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        error = ln_predicted @ weights - ln_price
        share = smape_of_ln(error) / 200  # tanh(|error| / 2), whose derivative is (1 − tanh²) / 2
        slope_by_error = (1 - share**2) / 2 * np.sign(error)
        slope_by_weight = slope_by_error @ ln_predicted / len(error)
        slope_by_logit = weights * (slope_by_weight - slope_by_weight @ weights)  # softmax's Jacobian
        return share.mean(), slope_by_logit

    best = minimize(smape_and_gradient, np.zeros(ln_predicted.shape[1]), jac=True, method="L-BFGS-B")
    weights = np.exp(best.x - best.x.max())
    return weights / weights.sum()


def interval_half_width(ln_error: np.ndarray, difficulty: np.ndarray, coverage: float) -> float:
    """Conformal factor q: intervals of ± q · difficulty in ln price cover at least `coverage` of new rows.

    The ceil((n+1)·coverage)-th smallest of |error| / difficulty over held-out rows (Vovk et al. 2005; Lei et al. 2018,
    "Distribution-free predictive inference for regression", section 2.2).

    Args:
        ln_error: (N,) ln predicted − ln price, out of fold.
        difficulty: (N,) > 0, how wide each row's interval is relative to the others'.
    """
    scores = np.sort(np.abs(ln_error) / difficulty)
    rank = int(np.ceil((len(scores) + 1) * coverage))
    return float(scores[rank - 1]) if rank <= len(scores) else float("inf")


def difficulty_of(ln_predicted: np.ndarray) -> np.ndarray:
    """(N, J) → (N,): where the models disagree, the price is less certain."""
    return USUAL_DIFFICULTY + ln_predicted.std(axis=1)
