"""Combine models by their out-of-fold predictions, keep the combination, and write test_out.csv.

    python -m ensemble.train --workspace OUT --members words_mlp words_ridge words_lightgbm

The weights of each hold-out are fitted on the other four, so the printed score is the error on rows that neither the
models nor their weights have seen. The weights that are kept and price other tables are fitted on all rows.

Legend: N rows, J members.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from contracts.files import write_json
from contracts.predictions import prediction_names, read_predictions, write_predictions
from contracts.smape import smape, smape_with_error
from contracts.splits import N_FOLDS, N_HOLDOUTS, fitted_on, roles, union_fitted_on
from contracts.workspace import Workspace
from ensemble.config import EnsembleSettings
from ensemble.predict import ln_prices_of, write_prices
from ensemble.saved import Ensemble, Member
from ensemble.weights import difficulty_of, fit_weights, interval_half_width
from training.plots import plot_error_by_price
from training.settings import parse_settings

COVERAGES = (0.80, 0.95)


@dataclass
class Candidates:
    """The models to combine, and their ln prices in the order of the tables' rows."""

    members: tuple[Member, ...]
    ln_predicted: dict[str, np.ndarray]
    """(N, J) of each table"""
    fitted_on: list[list[int]]
    """for the training rows of each fold, the folds that any member was fitted on"""
    leaked: bool
    """whether a member was fitted on rows that it predicts"""


def choose_members(workspace: Workspace, ids: dict[str, pd.Index], but: str) -> list[str]:
    """Every model that has priced all rows of all tables without having seen them, except the ensemble itself."""
    chosen = []
    for name in prediction_names(workspace):
        files = [workspace.path("predictions", name=name, split=table) for table in ids]
        if name == but or not all(file.is_file() for file in files):
            continue
        predictions = {table: read_predictions(workspace, name, table) for table in ids}
        if any(not ids[table].isin(predictions[table].sample_ids).all() for table in ids):
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


def read_candidates(
    workspace: Workspace, names: list[str], ids: dict[str, pd.Index], *, allow_leak: bool
) -> Candidates:
    """Read the prices of each model.

    Raises:
        InputError: a model lacks rows, or was fitted on rows that it predicts (unless `allow_leak`).
    """
    members, entries, leaked = [], [], False
    columns: dict[str, list[np.ndarray]] = {table: [] for table in ids}
    for name in names:
        for table in ids:
            columns[table].append(ln_prices_of(read_predictions(workspace, name, table), ids[table]))
        train = read_predictions(workspace, name, "train")
        if not allow_leak:
            train.require_unseen()
        leaked = leaked or not train.unseen.all()
        meta = train.meta or {"stage": "unknown", "model": name, "fitted_on": _all_folds()}
        entries.append(meta["fitted_on"])
        members.append(Member(name, meta["stage"], meta["model"]))
    ln_predicted = {table: np.stack(columns[table], axis=1) for table in ids}
    return Candidates(tuple(members), ln_predicted, union_fitted_on(*entries), leaked)


def _all_folds() -> list[list[int]]:
    return fitted_on(encoder_folds=tuple(range(N_FOLDS)))


def nested_predictions(ln_predicted: np.ndarray, ln_price: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Combined ln price (N,) of each hold-out, with weights fitted on the others."""
    combined = np.empty(len(ln_price))
    for holdout in range(N_HOLDOUTS):
        asked = np.isin(fold, roles(holdout).validate)
        weights = fit_weights(ln_predicted[~asked], ln_price[~asked])
        combined[asked] = ln_predicted[asked] @ weights
    return combined


def inside_nested_intervals(
    ln_error: np.ndarray, difficulty: np.ndarray, fold: np.ndarray, coverage: float
) -> np.ndarray:
    """Whether each row's price lies in its interval, (N,) bool; that of a hold-out is calibrated on the others."""
    inside = np.empty(len(ln_error), bool)
    for holdout in range(N_HOLDOUTS):
        asked = np.isin(fold, roles(holdout).validate)
        factor = interval_half_width(ln_error[~asked], difficulty[~asked], coverage)
        inside[asked] = np.abs(ln_error[asked]) <= factor * difficulty[asked]
    return inside


def fit_ensemble(candidates: Candidates, price: np.ndarray, fold: np.ndarray) -> tuple[Ensemble, np.ndarray]:
    """The ensemble, with weights and intervals of all rows and a nested score; and the nested ln prices (N,)."""
    ln_predicted, ln_price = candidates.ln_predicted["train"], np.log(price)
    nested = nested_predictions(ln_predicted, ln_price, fold)
    smape_of_all, error = smape_with_error(price, np.exp(nested))
    ln_error = nested - ln_price
    difficulty = difficulty_of(ln_predicted)
    coverage = {}
    for level in COVERAGES:
        coverage[f"{level:.0%}"] = float(inside_nested_intervals(ln_error, difficulty, fold, level).mean())
    score = {
        "leaked_smape" if candidates.leaked else "smape": smape_of_all,
        "standard_error": error,
        "rows": len(price),
        "coverage": coverage,
    }
    factors = {level: interval_half_width(ln_error, difficulty, level) for level in COVERAGES}
    weights = tuple(fit_weights(ln_predicted, ln_price).tolist())
    return Ensemble(candidates.members, weights, factors, score), nested


def table_of_members(
    candidates: Candidates, price: np.ndarray, fold: np.ndarray, weights: tuple[float, ...]
) -> pd.DataFrame:
    """Each model alone, its weight, and what the ensemble would score without it."""
    ln_predicted = candidates.ln_predicted["train"]
    lines = []
    for position, member in enumerate(candidates.members):
        others = np.delete(ln_predicted, position, axis=1)
        without = np.nan
        if others.shape[1]:
            without = smape(price, np.exp(nested_predictions(others, np.log(price), fold)))
        lines.append(
            {
                "model": member.name,
                "smape_alone": smape(price, np.exp(ln_predicted[:, position])),
                "weight": weights[position],
                "smape_without_it": without,
            }
        )
    return pd.DataFrame(lines)


def describe(ensemble: Ensemble, listed: pd.DataFrame, *, leaked: bool) -> str:
    """The table of members, the score and the coverage of the intervals, for people."""
    score = ensemble.score
    name, value = ("leaked", score["leaked_smape"]) if leaked else ("nested out-of-fold", score["smape"])
    covers = ", ".join(f"{share:.1%} at nominal {level}" for level, share in score["coverage"].items())
    return (
        f"{listed.to_string(index=False, float_format='%.3f')}\n"
        f"ensemble: {name} SMAPE {value:.2f} ± {score['standard_error']:.2f} on {score['rows']} rows\n"
        f"intervals cover {covers}"
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(EnsembleSettings, argv, description=__doc__.split("\n")[0])
    workspace = Workspace(settings.workspace)
    train = workspace.training_table()
    fold, price = train["fold"].to_numpy(), train["price"].to_numpy()
    ids = {"train": pd.Index(train["sample_id"])}
    if workspace.path("prepared", split="test").is_file():
        ids["test"] = pd.Index(workspace.prepared("test")["sample_id"])
    names = list(settings.members) or choose_members(workspace, ids, but=settings.run)
    candidates = read_candidates(workspace, names, ids, allow_leak=settings.allow_leak)
    ensemble, nested = fit_ensemble(candidates, price, fold)

    listed = table_of_members(candidates, price, fold, ensemble.weights)
    report = describe(ensemble, listed, leaked=candidates.leaked)
    print(report)
    folder = workspace.path("run", name=settings.run)
    summary = {**ensemble.score, "members": listed.to_dict("records")}
    ensemble.save(folder)
    write_json(folder / "summary.json", summary)
    title = report.splitlines()[-2]
    plot_error_by_price(folder / "error_by_price.png", price, np.exp(nested), title=title)

    meta = {"stage": "ensemble", "model": settings.run, "members": names, "fitted_on": candidates.fitted_on}
    log_price = np.log1p(np.exp(nested))
    write_predictions(
        workspace, settings.run, "train", ids["train"].to_numpy(), log_price, meta=meta, fold=fold
    )
    if "test" in ids:
        out = Path(settings.out) if settings.out else None
        write_prices(workspace, settings.run, ensemble, "test", candidates.ln_predicted["test"], out)
    return summary


if __name__ == "__main__":
    run_entry_point(main)
