"""Combine models by their out-of-fold predictions and write test_out.csv.

    python -m ensemble.train --workspace OUT --members words_mlp words_ridge words_lightgbm

The weights of each hold-out are fitted on the other four, so the printed score is the error on rows that neither the
models nor their weights have seen. The weights that price test.csv are fitted on all rows.

Legend: N rows, J models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, write_json
from contracts.predictions import Predictions, prediction_names, read_predictions, write_predictions
from contracts.smape import smape, smape_with_error
from contracts.splits import N_FOLDS, N_HOLDOUTS, fitted_on, roles, union_fitted_on
from contracts.workspace import SPLITS, Workspace
from ensemble.config import EnsembleSettings
from ensemble.weights import difficulty_of, fit_weights, interval_half_width
from training.plots import plot_error_by_price
from training.settings import parse_settings

COVERAGES = (0.80, 0.95)


@dataclass
class Members:
    """The models to combine, in the order of the tables' rows."""

    names: list[str]
    ln_predicted: dict[str, np.ndarray]
    """(N, J) ln prices of each split"""
    fitted_on: list[list[int]]
    """for the training rows of each fold, the folds that any member was fitted on"""
    leaked: bool
    """whether a member was fitted on rows that it predicts"""


def choose_members(workspace: Workspace, ids: dict[str, pd.Index], but: str) -> list[str]:
    """Every model that has priced all rows of both tables without having seen them, except the ensemble itself."""
    chosen = []
    for name in prediction_names(workspace):
        files = [workspace.path("predictions", name=name, split=split) for split in SPLITS]
        if name == but or not all(file.is_file() for file in files):
            continue
        predictions = {split: read_predictions(workspace, name, split) for split in SPLITS}
        if any(not ids[split].isin(predictions[split].sample_ids).all() for split in SPLITS):
            continue
        try:
            predictions["train"].require_unseen()
        except InputError as reason:
            print(f"left out: {reason}")
            continue
        chosen.append(name)
    if not chosen:
        raise InputError(
            f"{workspace.root / 'predictions'}: no model has predicted all rows out of fold; "
            "run word_models.train first"
        )
    return chosen


def read_members(
    workspace: Workspace, names: list[str], ids: dict[str, pd.Index], *, allow_leak: bool
) -> Members:
    """Read the prices of each model.

    Raises:
        InputError: a model lacks rows, or was fitted on rows that it predicts (unless `allow_leak`).
    """
    columns: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    entries = []
    leaked = False
    for name in names:
        for split in SPLITS:
            predictions = read_predictions(workspace, name, split)
            columns[split].append(_ln_price_of(predictions, ids[split]))
            if split == "test":
                continue
            if allow_leak:
                leaked = leaked or not predictions.unseen.all()
            else:
                predictions.require_unseen()
            unknown = fitted_on(encoder_folds=tuple(range(N_FOLDS)))
            entries.append(predictions.meta["fitted_on"] if predictions.meta else unknown)
    ln_predicted = {split: np.stack(columns[split], axis=1) for split in SPLITS}
    return Members(names, ln_predicted, union_fitted_on(*entries), leaked)


def _ln_price_of(predictions: Predictions, ids: pd.Index) -> np.ndarray:
    """(N,) ln prices in the order of `ids`."""
    by_id = predictions.by_id
    missing = ids.difference(by_id.index)
    if len(missing):
        raise InputError(
            f"{predictions.path}: no prediction for {len(missing)} rows, first {missing[0]}; it is not out of fold"
        )
    return np.log(by_id[ids].to_numpy())


def nested_predictions(ln_predicted: np.ndarray, ln_price: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Combined ln price (N,) of each hold-out, with weights fitted on the others."""
    combined = np.empty(len(ln_price))
    for holdout in range(N_HOLDOUTS):
        asked = np.isin(fold, roles(holdout).validate)
        weights = fit_weights(ln_predicted[~asked], ln_price[~asked])
        combined[asked] = ln_predicted[asked] @ weights
    return combined


def nested_coverage(ln_error: np.ndarray, difficulty: np.ndarray, fold: np.ndarray, coverage: float) -> float:
    """Share of rows inside the interval that was calibrated on the other hold-outs, (N,) each."""
    inside = np.empty(len(ln_error), bool)
    for holdout in range(N_HOLDOUTS):
        asked = np.isin(fold, roles(holdout).validate)
        factor = interval_half_width(ln_error[~asked], difficulty[~asked], coverage)
        inside[asked] = np.abs(ln_error[asked]) <= factor * difficulty[asked]
    return float(inside.mean())


def table_of_members(
    members: Members, price: np.ndarray, fold: np.ndarray, weights: np.ndarray
) -> pd.DataFrame:
    """Each model alone, its weight, and what the ensemble would score without it."""
    ln_predicted = members.ln_predicted["train"]
    lines = []
    for position, name in enumerate(members.names):
        others = np.delete(ln_predicted, position, axis=1)
        without = np.nan
        if others.shape[1]:
            without = smape(price, np.exp(nested_predictions(others, np.log(price), fold)))
        lines.append(
            {
                "model": name,
                "smape_alone": smape(price, np.exp(ln_predicted[:, position])),
                "weight": weights[position],
                "smape_without_it": without,
            }
        )
    return pd.DataFrame(lines)


def with_intervals(
    submission: pd.DataFrame, ln_price: np.ndarray, half_widths: dict[float, np.ndarray]
) -> pd.DataFrame:
    """The submission with the columns low_<level> and high_<level> of each coverage."""
    table = submission.copy()
    for level, half in half_widths.items():
        table[f"low_{level:.0%}"] = np.exp(ln_price - half).round(4)
        table[f"high_{level:.0%}"] = np.exp(ln_price + half).round(4)
    return table


@dataclass
class Combined:
    """The ensemble of some members, scored and applied."""

    weights: np.ndarray
    """(J,) fitted on all training rows; they price the test rows"""
    ln_price: dict[str, np.ndarray]
    """of the training rows with nested weights, of the test rows with `weights`"""
    score: float
    error: float
    coverage: dict[str, float]
    half_widths: dict[float, np.ndarray]
    """of the test rows' intervals in ln price, for each of COVERAGES"""


def combine(members: Members, price: np.ndarray, fold: np.ndarray) -> Combined:
    """Fit weights and intervals: hold-out by hold-out for the score, on all rows for the test prices."""
    ln_predicted, ln_price = members.ln_predicted["train"], np.log(price)
    nested = nested_predictions(ln_predicted, ln_price, fold)
    score, error = smape_with_error(price, np.exp(nested))
    ln_error = nested - ln_price
    difficulty = difficulty_of(ln_predicted)
    coverage = {f"{level:.0%}": nested_coverage(ln_error, difficulty, fold, level) for level in COVERAGES}

    weights = fit_weights(ln_predicted, ln_price)
    spread = difficulty_of(members.ln_predicted["test"])
    half_widths = {level: interval_half_width(ln_error, difficulty, level) * spread for level in COVERAGES}
    of_splits = {"train": nested, "test": members.ln_predicted["test"] @ weights}
    return Combined(weights, of_splits, score, error, coverage, half_widths)


def write_scores(
    folder: Path, members: Members, combined: Combined, price: np.ndarray, fold: np.ndarray
) -> dict:
    """Print and store the table of members, the score and the coverage of the intervals; returns the summary."""
    name = "leaked" if members.leaked else "nested out-of-fold"
    listed = table_of_members(members, price, fold, combined.weights)
    covers = ", ".join(f"{share:.1%} at nominal {level}" for level, share in combined.coverage.items())
    print(listed.to_string(index=False, float_format="%.3f"))
    print(f"ensemble: {name} SMAPE {combined.score:.2f} ± {combined.error:.2f} on {len(price)} rows")
    print(f"intervals cover {covers}")
    summary = {
        "leaked_smape" if members.leaked else "smape": combined.score,
        "standard_error": combined.error,
        "rows": len(price),
        "coverage": combined.coverage,
        "members": listed.to_dict("records"),
    }
    write_json(folder / "summary.json", summary)
    title = f"{folder.name}: {name} SMAPE {combined.score:.2f}"
    plot_error_by_price(folder / "error_by_price.png", price, np.exp(combined.ln_price["train"]), title=title)
    return summary


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(EnsembleSettings, argv, description=__doc__.split("\n")[0])
    workspace = Workspace(settings.workspace)
    train, test = workspace.training_table(), workspace.prepared("test")
    fold, price = train["fold"].to_numpy(), train["price"].to_numpy()
    ids = {"train": pd.Index(train["sample_id"]), "test": pd.Index(test["sample_id"])}
    names = list(settings.members) or choose_members(workspace, ids, but=settings.run)
    members = read_members(workspace, names, ids, allow_leak=settings.allow_leak)
    combined = combine(members, price, fold)
    summary = write_scores(workspace.path("run", name=settings.run), members, combined, price, fold)

    all_folds = fitted_on(encoder_folds=tuple(range(N_FOLDS)))
    for split, seen in (("train", members.fitted_on), ("test", all_folds)):
        write_predictions(
            workspace, settings.run, split, ids[split].to_numpy(), np.log1p(np.exp(combined.ln_price[split])),
            meta={"stage": "ensemble", "model": settings.run, "members": members.names, "fitted_on": seen},
            fold=fold if split == "train" else None,
        )  # fmt: skip
    out = Path(settings.out) if settings.out else workspace.path("submission")
    test_ln_price = combined.ln_price["test"]
    submission = pd.DataFrame({"sample_id": ids["test"], "price": np.exp(test_ln_price).round(4)})
    _write(out, submission)
    if settings.intervals:
        intervals = with_intervals(submission, test_ln_price, combined.half_widths)
        _write(out.with_name("test_intervals.csv"), intervals)
    print(f"{out}: {len(submission)} prices, median ${submission['price'].median():.2f}")
    return summary


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as file:
        table.to_csv(file, index=False)


if __name__ == "__main__":
    run_entry_point(main)
