"""How good answers are, and how far their confidence can be trusted.

Consistency is overconfident: the same mistake can be made seven times. An isotonic curve, fitted to labelled listings,
turns it into the probability that the answer is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from attributes.data import Label
from attributes.shards import Answered
from contracts.errors import InputError

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Consistency to the probability of being right: a rising line through a few points."""

    consistency: tuple[float, ...]
    probability: tuple[float, ...]

    @classmethod
    def fit(cls, consistency: np.ndarray, right: np.ndarray) -> Calibration:
        """From (n,) consistencies and (n,) bool. Raises InputError for fewer than two answers."""
        from sklearn.isotonic import IsotonicRegression

        if len(consistency) < 2:
            raise InputError(f"calibration: {len(consistency)} answers with a label, at least 2 are needed")
        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(
            consistency, right.astype(float)
        )
        return cls(tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()))

    @classmethod
    def none(cls) -> Calibration:
        """Takes consistency for what it is."""
        return cls((0.0, 1.0), (0.0, 1.0))

    def __call__(self, consistency: np.ndarray) -> np.ndarray:
        return np.interp(consistency, self.consistency, self.probability)


def as_table(
    answered: Sequence[Answered], greedy: Sequence[str | None], labels: Sequence[Label]
) -> pd.DataFrame:
    """One row per label: truth, vote, consistency, greedy answer, share of the chains that are right and valid.

    Args:
        answered: the chains of each label, in the order of the labels.
        greedy: the most probable reply's answer to each.
    """
    rows = []
    for label, each, most_probable in zip(labels, answered, greedy, strict=True):
        agreed = each.consensus
        answers = [chain.answer for chain in each.chains]
        rows.append(
            {
                "sample_id": label.listing.sample_id,
                "vertical": label.listing.vertical,
                "attribute": label.attribute.name,
                "closed": label.attribute.kind == "closed",
                "truth": label.value,
                "vote": agreed.value,
                "consistency": agreed.consistency,
                "sampled": np.mean([answer == label.value for answer in answers]) if answers else 0.0,
                "greedy": float(most_probable == label.value),
                "valid": np.mean([answer is not None for answer in answers]) if answers else 0.0,
            }
        )
    table = pd.DataFrame(rows)
    table["right"] = (table["vote"] == table["truth"]).astype(float)
    return table


def score(table: pd.DataFrame, calibration: Calibration, *, resamples: int, seed: int) -> dict[str, Any]:
    """All scores of a table of `as_table`; three accuracies, named apart, each with a 95 % interval over listings."""
    accuracies = {"sampled": "sampled_accuracy", "greedy": "greedy_accuracy", "right": "vote_accuracy"}
    scores: dict[str, Any] = {"labels": len(table), "listings": int(table["sample_id"].nunique())}
    for column, name in accuracies.items():
        scores[name] = float(table[column].mean())
        scores[f"{name}_95"] = bootstrap(table, column, resamples=resamples, seed=seed)
    majority = table.groupby(["vertical", "attribute"])["truth"].agg(
        lambda truth: truth.value_counts().iloc[0]
    )
    scores["majority_accuracy"] = float(majority.sum() / len(table))
    scores["macro_f1"] = macro_f1(table)
    scores["valid_share"] = float(table["valid"].mean())
    consistency = table["consistency"].to_numpy()
    right = table["right"].to_numpy()
    scores["ece_of_consistency"] = expected_calibration_error(consistency, right)
    scores["ece"] = expected_calibration_error(calibration(consistency), right)
    scores["reliability"] = reliability(consistency, right)
    scores["risk_and_coverage"] = risk_and_coverage(consistency, right)
    by_attribute = {}
    for (vertical, attribute), part in table.groupby(["vertical", "attribute"], sort=False):
        means = part[["sampled", "greedy", "right", "valid"]].mean().to_dict()
        by_attribute[f"{vertical}.{attribute}"] = {"labels": len(part), **means}
    scores["by_attribute"] = by_attribute
    return scores


def macro_f1(table: pd.DataFrame) -> float | None:
    """Mean over the closed attributes of the mean F1 of their true values; None without a closed attribute."""
    from sklearn.metrics import f1_score

    scores = []
    for _, part in table[table["closed"]].groupby(["vertical", "attribute"]):
        values = sorted(part["truth"].unique())
        predicted = part["vote"].fillna("").tolist()
        scores.append(
            f1_score(part["truth"].tolist(), predicted, labels=values, average="macro", zero_division=0)
        )
    return float(np.mean(scores)) if scores else None


def bootstrap(table: pd.DataFrame, column: str, *, resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of a column, over resampled listings: labels of one listing are not independent."""
    by_listing = table.groupby("sample_id")[column].agg(["sum", "count"]).to_numpy(float)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(by_listing), size=(resamples, len(by_listing)))
    sums = by_listing[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(low), float(high)


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Per bin of confidence: answers, mean confidence and the share that is right."""
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    lines = []
    for bin_number in np.unique(number):
        own = number == bin_number
        line = {
            "answers": int(own.sum()),
            "confidence": float(confidence[own].mean()),
            "right": float(right[own].mean()),
        }
        lines.append(line)
    return lines


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean over the answers of |confidence − share that is right| in the answer's bin."""
    lines = reliability(confidence, right)
    return sum(line["answers"] * abs(line["confidence"] - line["right"]) for line in lines) / len(right)


def risk_and_coverage(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """For every confidence that occurs: the share of answers at or above it, and the share of those that is wrong."""
    lines = []
    for threshold in np.unique(confidence)[::-1]:
        kept = confidence >= threshold
        line = {
            "threshold": float(threshold),
            "coverage": float(kept.mean()),
            "risk": float(1 - right[kept].mean()),
        }
        lines.append(line)
    return lines


def plot(path: Any, table: pd.DataFrame, calibration: Calibration, *, title: str) -> None:
    """Reliability before and after calibration, and risk against coverage."""
    from training.plots import figure_at

    consistency = table["consistency"].to_numpy()
    right = table["right"].to_numpy()
    with figure_at(path, columns=2, width=4.6, height=4) as (figure, (left, other)):
        figure.suptitle(title)
        left.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        curves: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [
            ("consistency", Calibration.none()),
            ("calibrated", calibration),
        ]
        for name, confidence in curves:
            lines = reliability(confidence(consistency), right)
            left.plot(
                [line["confidence"] for line in lines], [line["right"] for line in lines], "o-", label=name
            )
        left.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
        left.legend(frameon=False)
        points = risk_and_coverage(consistency, right)
        other.plot([point["coverage"] for point in points], [point["risk"] for point in points], "o-")
        other.set(xlabel="coverage: share of answers kept", ylabel="risk: share of those that is wrong")
