"""Weights over models by SMAPE, and conformal intervals. Plain numpy on out-of-fold predictions.

Legend: N rows, J models.
"""

from __future__ import annotations

import numpy as np


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
        half = np.tanh(np.abs(error) / 2)  # SMAPE / 200, see contracts.smape
        slope = ((1 - half**2) / 2 * np.sign(error)) @ ln_predicted / len(error)  # by weight
        return half.mean(), weights * (slope - slope @ weights)  # by logit: softmax's Jacobian

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
    """(N, J) → (N,): where the models disagree the price is less certain; the constant keeps it from 0."""
    return 0.3 + ln_predicted.std(axis=1)
