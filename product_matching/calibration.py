"""Confidence: the probability that two records are one product, from the cosine of their embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from contracts.errors import InputError

HIGH = 0.85
"""A match probability above this is a high confidence."""
MEDIUM = 0.75
"""A match probability above this, up to HIGH, is a medium confidence; anything lower is a low one."""

WEAK_PENALTY = 1e6
"""scikit-learn's C. Its default of 1 shrinks the slope, since cosines span less than 1; this hardly does."""


@dataclass(frozen=True)
class Calibration:
    """Match probability as a logistic curve over the cosine: 1 / (1 + exp(−(slope · cosine + intercept))).

    The curve is fitted to labelled pairs (Platt 1999, "Probabilistic outputs for support vector machines").
    """

    slope: float
    intercept: float
    pairs: int
    """number of labelled pairs that the curve was fitted to"""

    @classmethod
    def fit(cls, cosine: np.ndarray, match: np.ndarray) -> Calibration:
        """Fit the curve to the cosine (n,) and label (n,) bool of n pairs.

        If a higher cosine does not mean more matches, the curve is flat at the share of matches.

        Raises InputError when all pairs have one label.
        """
        from sklearn.linear_model import LogisticRegression

        if match.all() or not match.any():
            raise InputError("calibration needs validation pairs that match and pairs that do not")
        fitted = LogisticRegression(C=WEAK_PENALTY, max_iter=1000).fit(cosine[:, None], match)
        slope = float(fitted.coef_[0, 0])
        intercept = float(fitted.intercept_[0])
        if slope <= 0:
            share = match.mean()
            slope = 0.0
            intercept = float(np.log(share / (1 - share)))
        return cls(slope, intercept, len(match))

    def probability(self, cosine: np.ndarray | float) -> np.ndarray:
        """Match probability of each cosine, float64 of the same shape."""
        logit = self.slope * np.asarray(cosine, np.float64) + self.intercept
        return 1 / (1 + np.exp(-logit))


def confidence_band(probability: float) -> str:
    """high, medium or low."""
    if probability > HIGH:
        return "high"
    if probability > MEDIUM:
        return "medium"
    return "low"
