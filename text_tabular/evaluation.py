"""Scores and plots of a trained model on rows that it has not seen.

Legend: N rows, n validation rows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contracts.files import write_json
from text_tabular.columns import Target
from text_tabular.metrics import Calibration, score_classes, score_numbers
from training.plots import figure_at


@dataclass
class HeldOut:
    """What a model says of rows that it has not seen."""

    outputs: np.ndarray
    """(n, K) logits, or (n,) standardised numbers"""
    values: np.ndarray
    """(n,) true classes as numbers, or standardised numbers"""
    text_share: np.ndarray
    """(n,) of each decision"""


def score(held_out: HeldOut, target: Target, calibration: Calibration) -> dict[str, Any]:
    """Every score of the held-out rows; numbers in the units of the table."""
    if target.task == "regression":
        predicted = held_out.outputs * target.deviation + target.mean
        return score_numbers(predicted, held_out.values * target.deviation + target.mean)
    return score_classes(held_out.outputs, held_out.values, target.classes, calibration)


def write_scores(folder: Path, held_out: HeldOut, target: Target, calibration: Calibration) -> dict[str, Any]:
    """Leave scores.json and the plots in a run folder; returns the scores that are single numbers."""
    scores = score(held_out, target, calibration)
    shares = shares_by_class(held_out, target)
    write_json(folder / "scores.json", {**scores, "text_share": shares})
    plot_shares(folder / "text_share.png", shares)
    if target.task == "classification":
        plot_confusion(folder / "confusion.png", np.array(scores["confusion"]), target.classes)
        plot_reliability(folder / "reliability.png", scores)
    else:
        plot_numbers(folder / "predicted_and_true.png", held_out, target, scores)
    return {name: value for name, value in scores.items() if isinstance(value, (int, float))}


def shares_by_class(held_out: HeldOut, target: Target) -> dict[str, dict[str, float]]:
    """Mean and spread of the text's share of the decision, by true class; of numbers over all rows."""
    if target.task == "regression":
        groups = {"all rows": np.ones(len(held_out.values), bool)}
    else:
        groups = {name: held_out.values == number for number, name in enumerate(target.classes)}
    shares = {}
    for name, rows in groups.items():
        if rows.any():
            own = held_out.text_share[rows]
            shares[name] = {"rows": int(rows.sum()), "mean": float(own.mean()), "deviation": float(own.std())}
    return shares


def plot_shares(path: Path, shares: dict[str, dict[str, float]]) -> None:
    """The text's share of the decision by class, with the spread over rows."""
    with figure_at(path, columns=1, width=7, height=1.2 + 0.45 * len(shares)) as (_, (axes,)):
        names = [f"{name} (n={share['rows']})" for name, share in shares.items()]
        means = np.array([share["mean"] for share in shares.values()])
        axes.barh(names, means, color="#4477aa", label="text")
        axes.barh(names, 1 - means, left=means, color="#ddaa33", label="fields")
        deviations = [share["deviation"] for share in shares.values()]
        axes.errorbar(means, names, xerr=deviations, fmt="none", color="black", capsize=3)
        axes.set(xlim=(0, 1), xlabel="share of the decision (bars: spread over rows)")
        axes.invert_yaxis()
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=2, frameon=False)


def plot_confusion(path: Path, counts: np.ndarray, names: tuple[str, ...]) -> None:
    """Counts (K, K), true classes in rows, coloured by the share of the true class."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.5 + 0.6 * len(names)
    with figure_at(path, columns=1, width=size + 1, height=size) as (_, (axes,)):
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted", ylabel="true")
        for true in range(len(names)):
            for predicted in range(len(names)):
                colour = "white" if shares[true, predicted] > 0.5 else "black"
                axes.text(predicted, true, counts[true, predicted], ha="center", va="center", color=colour)


def plot_reliability(path: Path, scores: dict[str, Any]) -> None:
    """Confidence against the share that is right; the size of a point is its share of the rows."""
    with figure_at(path, columns=1, width=5, height=4.5) as (_, (axes,)):
        lines = scores["reliability"]
        rows = np.array([line["rows"] for line in lines])
        axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        axes.scatter(
            [line["confidence"] for line in lines], [line["right"] for line in lines], s=400 * rows / rows.sum(),
            color="#4477aa", alpha=0.8,
        )  # fmt: skip
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="share that is right")
        axes.set_title(
            f"ECE {scores['ece']:.3f} with temperature, {scores['ece_before_temperature']:.3f} without",
            fontsize=10,
        )


def plot_numbers(path: Path, held_out: HeldOut, target: Target, scores: dict[str, Any]) -> None:
    with figure_at(path, columns=1, width=5, height=4.5) as (_, (axes,)):
        true = held_out.values * target.deviation + target.mean
        predicted = held_out.outputs * target.deviation + target.mean
        axes.scatter(true, predicted, s=8, alpha=0.5, color="#4477aa")
        ends = [true.min(), true.max()]
        axes.plot(ends, ends, color="grey", linestyle="--", linewidth=1)
        axes.set(xlabel="true", ylabel="predicted")
        axes.set_title(f"MAE {scores['mae']:.3g}, R² {scores['r2']:.2f}", fontsize=10)
