"""Combine models by their out-of-fold predictions and write test_out.csv.

    python -m ensemble.train --workspace OUT --members words_mlp words_ridge words_lightgbm

The weights of each hold-out are fitted on the other four, so the score that is printed is one of rows that neither the
models nor their weights have seen. The weights that price test.csv are fitted on all rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, write_json
from contracts.smape import smape, smape_with_error
from contracts.splits import N_HOLDOUTS, roles
from contracts.workspace import Workspace
from ensemble.config import EnsembleSettings
from ensemble.weights import difficulty_of, fit_weights, interval_half_width
from training.plots import plot_error_by_price
from training.settings import parse_settings

COVERAGES = (0.80, 0.95)


def read_members(
    workspace: Workspace, names: tuple[str, ...], ids: dict[str, pd.Index]
) -> dict[str, pd.DataFrame]:
    """ln prices of each split, one column a model. Raises InputError for a model that lacks rows."""
    members = {}
    for split, index in ids.items():
        columns = {}
        for name in names:
            path = workspace.path("predictions", name=name, split=split)
            table = read_table(path).set_index("sample_id")
            missing = index.difference(table.index)
            if len(missing):
                raise InputError(
                    f"{path}: no prediction for {len(missing)} rows, first {missing[0]}; it is not out of fold"
                )
            price = np.expm1(table["log_price"].astype(float)[index].to_numpy())
            columns[name] = np.log(np.maximum(price, 0.01))
        members[split] = pd.DataFrame(columns, index=index)
    return members


def complete_members(workspace: Workspace, ids: dict[str, pd.Index], but: str) -> tuple[str, ...]:
    """Every model that has predicted all rows of both splits."""
    found = []
    for path in sorted(workspace.path("predictions", name="x", split="train").parent.glob("*_train.csv")):
        name = path.name.removesuffix("_train.csv")
        paths = {split: workspace.path("predictions", name=name, split=split) for split in ids}
        if name != but and all(
            p.is_file() and ids[s].isin(read_table(p)["sample_id"]).all() for s, p in paths.items()
        ):
            found.append(name)
    return tuple(found)


def nested_predictions(ln_predicted: np.ndarray, ln_price: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Combined ln price (N,) of each hold-out with weights fitted on the others."""
    combined = np.empty(len(ln_price))
    for holdout in range(N_HOLDOUTS):
        asked = np.isin(fold, roles(holdout).validate)
        combined[asked] = ln_predicted[asked] @ fit_weights(ln_predicted[~asked], ln_price[~asked])
    return combined


def nested_coverage(
    combined: np.ndarray, ln_price: np.ndarray, difficulty: np.ndarray, fold: np.ndarray
) -> dict[str, float]:
    """Share of rows inside the interval that was calibrated on the other hold-outs."""
    covered = {}
    for coverage in COVERAGES:
        inside = np.empty(len(ln_price), bool)
        for holdout in range(N_HOLDOUTS):
            asked = np.isin(fold, roles(holdout).validate)
            error = combined - ln_price
            factor = interval_half_width(error[~asked], difficulty[~asked], coverage)
            inside[asked] = np.abs(error[asked]) <= factor * difficulty[asked]
        covered[f"{coverage:.0%}"] = float(inside.mean())
    return covered


def table_of_members(
    ln_predicted: pd.DataFrame, price: np.ndarray, fold: np.ndarray, weights: np.ndarray
) -> pd.DataFrame:
    """Each model alone, its weight, and what the ensemble would score without it."""
    lines = []
    for position, name in enumerate(ln_predicted.columns):
        others = np.delete(ln_predicted.to_numpy(), position, axis=1)
        without = (
            smape(price, np.exp(nested_predictions(others, np.log(price), fold)))
            if others.shape[1]
            else np.nan
        )
        alone = smape(price, np.exp(ln_predicted[name].to_numpy()))
        lines.append(
            {"model": name, "smape_alone": alone, "weight": weights[position], "smape_without_it": without}
        )
    return pd.DataFrame(lines)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(EnsembleSettings, argv, description=__doc__.split("\n")[0])
    workspace = Workspace(settings.workspace)
    train = workspace.prepared("train").set_index("sample_id")
    ids = {"train": train.index, "test": pd.Index(workspace.prepared("test")["sample_id"])}
    fold, price = workspace.folds()[train.index].to_numpy(), train["price"].to_numpy()
    names = settings.members or complete_members(workspace, ids, but=settings.name)
    if not names:
        raise InputError(
            f"{workspace.root / 'predictions'}: no model has predicted all rows; run word_models.train first"
        )
    members = read_members(workspace, names, ids)

    ln_predicted, ln_price = members["train"].to_numpy(), np.log(price)
    weights = fit_weights(ln_predicted, ln_price)
    combined = nested_predictions(ln_predicted, ln_price, fold)
    score, error = smape_with_error(price, np.exp(combined))
    difficulty = difficulty_of(ln_predicted)
    coverage = nested_coverage(combined, ln_price, difficulty, fold)
    listed = table_of_members(members["train"], price, fold, weights)
    print(listed.to_string(index=False, float_format="%.3f"))
    print(f"ensemble: nested out-of-fold SMAPE {score:.2f} ± {error:.2f} on {len(price)} rows")
    print(
        "intervals cover " + ", ".join(f"{share:.1%} at nominal {level}" for level, share in coverage.items())
    )

    folder = workspace.path("run", name=settings.name)
    summary = {"smape": score, "standard_error": error, "rows": len(price), "coverage": coverage,
               "members": listed.to_dict("records")}  # fmt: skip
    write_json(folder / "summary.json", summary)
    plot_error_by_price(
        folder / "error_by_price.png", price, np.exp(combined), title=f"{settings.name}: SMAPE {score:.2f}"
    )

    test_ln_price = members["test"].to_numpy() @ weights
    _write(workspace.path("predictions", name=settings.name, split="train"),
           pd.DataFrame({"sample_id": train.index, "log_price": np.log1p(np.exp(combined)), "fold": fold}))  # fmt: skip
    _write(workspace.path("predictions", name=settings.name, split="test"),
           pd.DataFrame({"sample_id": ids["test"], "log_price": np.log1p(np.exp(test_ln_price))}))  # fmt: skip
    out = Path(settings.out) if settings.out else workspace.path("submission")
    submission = pd.DataFrame({"sample_id": ids["test"], "price": np.exp(test_ln_price).round(4)})
    _write(out, submission)
    if settings.intervals:
        spread = difficulty_of(members["test"].to_numpy())
        for level in COVERAGES:
            half = interval_half_width(combined - ln_price, difficulty, level) * spread
            submission[f"low_{level:.0%}"] = np.exp(test_ln_price - half).round(4)
            submission[f"high_{level:.0%}"] = np.exp(test_ln_price + half).round(4)
        _write(out.with_name("test_intervals.csv"), submission)
    print(f"{out}: {len(submission)} prices, median ${submission['price'].median():.2f}")
    return summary


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as file:
        table.to_csv(file, index=False)


if __name__ == "__main__":
    run_entry_point(main)
