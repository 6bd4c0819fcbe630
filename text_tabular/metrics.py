"""How good predictions are: classes, probabilities, numbers; and what is calibrated on the stop fold.

Legend: N rows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)
from sklearn.preprocessing import label_binarize

RELIABILITY_BINS = 15


@dataclass
class Calibration:
    """Chosen on the stop fold, applied to everything else."""

    temperature: float = 1.0
    """logits are divided by it (Guo et al., 2017, arXiv 1706.04599)"""
    threshold: float = 0.5
    """of two classes the second one is predicted from this probability on"""

    @classmethod
    def fit(cls, logits: np.ndarray, classes: np.ndarray) -> Calibration:
        """The temperature with the lowest log loss and, for two classes, the threshold with the highest macro-F1.

        Args:
            logits: (N, K).
            classes: (N,) numbers of the true classes.
        """
        bounds = (np.log(0.1), np.log(10))
        found = minimize_scalar(
            lambda log: log_loss(logits / np.exp(log), classes), bounds=bounds, method="bounded"
        )
        calibration = cls(temperature=float(np.exp(found.x)))
        if logits.shape[1] == 2:
            calibration.threshold = best_threshold(calibration.probabilities(logits)[:, 1], classes)
        return calibration

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(N, K) logits to (N, K) probabilities."""
        return softmax(logits / self.temperature, axis=1)

    def predicted(self, probabilities: np.ndarray) -> np.ndarray:
        """(N,) number of the class that is predicted."""
        if probabilities.shape[1] == 2:
            return (probabilities[:, 1] >= self.threshold).astype(np.int64)
        return probabilities.argmax(axis=1)


def log_loss(logits: np.ndarray, classes: np.ndarray) -> float:
    """Mean of −ln of the probability of the true class."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(classes)), classes].mean())


def best_threshold(probability: np.ndarray, classes: np.ndarray) -> float:
    """The probability (of class 1, (N,)) from which on class 1 is predicted so that macro-F1 is highest.

    Candidates lie between neighbouring probabilities. Of equally good ones the one nearest to one half is taken.
    """
    values = np.unique(probability)
    between = (values[:-1] + values[1:]) / 2
    candidates = np.append(between, 0.5)
    scores = [
        f1_score(classes, probability >= candidate, average="macro", zero_division=0)
        for candidate in candidates
    ]
    best = np.flatnonzero(np.isclose(scores, max(scores)))
    return float(candidates[best[np.abs(candidates[best] - 0.5).argmin()]])


def reliability(probabilities: np.ndarray, classes: np.ndarray) -> list[dict[str, float]]:
    """Per bin of confidence: its rows, their mean confidence and the share that is right."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == classes
    bins = np.minimum((confidence * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    lines = []
    for number in np.unique(bins):
        own = bins == number
        line = {
            "rows": int(own.sum()),
            "confidence": float(confidence[own].mean()),
            "right": float(right[own].mean()),
        }
        lines.append(line)
    return lines


def expected_calibration_error(probabilities: np.ndarray, classes: np.ndarray) -> float:
    """Mean over the rows of |confidence − share that is right| in the row's bin (15 bins of equal width)."""
    gaps = [
        line["rows"] * abs(line["confidence"] - line["right"]) for line in reliability(probabilities, classes)
    ]
    return sum(gaps) / len(classes)


def score_classes(
    logits: np.ndarray, classes: np.ndarray, names: tuple[str, ...], calibration: Calibration
) -> dict[str, Any]:
    """Every score of N rows with (N, K) logits; macro means over the classes that occur among them."""
    probabilities = calibration.probabilities(logits)
    predicted = calibration.predicted(probabilities)
    present = np.unique(classes)
    truth = label_binarize(classes, classes=np.arange(len(names) + 1))[
        :, : len(names)
    ]  # (N, K), also for K = 2
    if len(names) == 2:
        pr_auc = average_precision_score(truth[:, 1], probabilities[:, 1])
    else:
        pr_auc = np.mean([average_precision_score(truth[:, k], probabilities[:, k]) for k in present])
    majority = np.bincount(classes).max() / len(classes)
    return {
        "rows": len(classes),
        "accuracy": float(accuracy_score(classes, predicted)),
        "accuracy_of_most_frequent_class": float(majority),
        "macro_f1": float(f1_score(classes, predicted, labels=present, average="macro", zero_division=0)),
        "pr_auc": float(pr_auc),
        "log_loss": log_loss(logits / calibration.temperature, classes),
        "ece": expected_calibration_error(probabilities, classes),
        "ece_before_temperature": expected_calibration_error(softmax(logits, axis=1), classes),
        "confusion": confusion_matrix(classes, predicted, labels=np.arange(len(names))).tolist(),
        "reliability": reliability(probabilities, classes),
    }


def score_numbers(predicted: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """MAE, RMSE and R² of N numbers, and the MAE of the best constant."""
    return {
        "rows": len(truth),
        "mae": float(mean_absolute_error(truth, predicted)),
        "rmse": float(root_mean_squared_error(truth, predicted)),
        "r2": float(r2_score(truth, predicted)),
        "mae_of_best_constant": float(np.abs(truth - np.median(truth)).mean()),
    }
