"""Combine models by their predictions of unseen rows, keep the combination, and write test_out.csv.

    python -m ensemble.train --workspace OUT --members words_mlp words_ridge words_lightgbm

The ensemble is fitted on the training rows that every member has priced without having seen them. They are cut into
parts: the hold-outs or, where the members share a single hold-out, its two folds. The weights of each part are fitted
on the others, so the printed score is the error on rows that neither the models nor their weights have seen. The
weights that are kept and price other tables are fitted on all of these rows.

Legend: N rows, J members.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from contracts.files import write_json
from contracts.predictions import Predictions, prediction_names, read_predictions, write_predictions
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
    """The models to combine, and their ln prices."""

    members: tuple[Member, ...]
    train_ids: pd.Index
    """(N,) sample_id of the training rows that every model has priced without having seen them"""
    ln_predicted: dict[str, np.ndarray]
    """(N, J) of each table: of these rows of train, and of all rows of another table"""
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
        lacking = [table for table in ids if not ids[table].isin(predictions[table].sample_ids).all()]
        if lacking:
            listed = " and ".join(lacking)
            print(
                f"left out: {name} has not priced every row of {listed}; --members can name it nevertheless"
            )
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
            "run word_models.train first, or name the models of one hold-out with --members"
        )
    return chosen


def read_candidates(
    workspace: Workspace,
    names: list[str],
    fold: pd.Series,
    test_ids: pd.Index | None = None,
    *,
    allow_leak: bool,
) -> Candidates:
    """Read the prices of each model.

    Args:
        fold: of every training row, by sample_id.
        test_ids: rows of the test table, in its order; None where there is none.

    Raises:
        InputError: a model has priced no whole fold without having seen it, the models have no two folds in common, or
            one lacks rows of test.
    """
    predictions = {name: read_predictions(workspace, name, "train") for name in names}
    folds = common_folds(predictions, fold, allow_leak=allow_leak)
    ids = {"train": fold.index[fold.isin(folds)]}
    if test_ids is not None:
        ids["test"] = test_ids
    members, entries, leaked = [], [], False
    columns: dict[str, list[np.ndarray]] = {table: [] for table in ids}
    for name, of_train in predictions.items():
        for table in ids:
            of_table = of_train if table == "train" else read_predictions(workspace, name, table)
            columns[table].append(ln_prices_of(of_table, ids[table]))
        is_used = np.isin(of_train.sample_ids, ids["train"])
        leaked = leaked or not of_train.unseen[is_used].all()
        meta = of_train.meta or {"stage": "unknown", "model": name, "fitted_on": _all_folds()}
        entries.append(meta["fitted_on"])
        members.append(Member(name, meta["stage"], meta["model"]))
    ln_predicted = {table: np.stack(columns[table], axis=1) for table in ids}
    fitted = union_fitted_on(*entries, weights_fitted_on(folds))
    return Candidates(tuple(members), ids["train"], ln_predicted, fitted, leaked)


def _all_folds() -> list[list[int]]:
    return fitted_on(encoder_folds=tuple(range(N_FOLDS)))


def common_folds(
    predictions: dict[str, Predictions], fold: pd.Series, *, allow_leak: bool
) -> tuple[int, ...]:
    """The folds of which every model has priced every row, and (unless `allow_leak`) has seen none.

    Args:
        predictions: of the training rows, by model.
        fold: of every training row, by sample_id.
    """
    covered = {}
    for name, of_model in predictions.items():
        counts = allow_leak | of_model.unseen
        priced = fold.index.isin(of_model.sample_ids[counts])
        covered[name] = set(fold) - set(fold[~priced])
        if covered[name]:
            continue
        if not allow_leak:
            of_model.require_unseen()  # raises if it has seen what it predicts
        missing = fold.index[~priced]
        raise InputError(
            f"{of_model.path}: no prediction for {len(missing)} rows, first {missing[0]}; it is not out of fold, and "
            "no hold-out is whole"
        )
    common = sorted(set.intersection(*covered.values()))
    if len(parts_of(common)) > 1:
        return tuple(common)
    listed = "; ".join(f"{name} {_written(folds)}" for name, folds in covered.items())
    raise InputError(
        f"the members need two folds that all of them have priced unseen, and have priced these: {listed}; "
        "train them out of fold or on the same hold-out"
    )


def _written(folds: set[int]) -> str:
    return "all folds" if len(folds) == N_FOLDS else "folds " + " ".join(map(str, sorted(folds)))


def parts_of(folds: Iterable[int]) -> list[list[int]]:
    """The folds, grouped by hold-out; those of a single hold-out each by itself."""
    present = sorted(set(folds))
    by_holdout = []
    for holdout in range(N_HOLDOUTS):
        part = [fold for fold in present if fold in roles(holdout).validate]
        if part:
            by_holdout.append(part)
    if len(by_holdout) > 1:
        return by_holdout
    return [[fold] for fold in present]


def weights_fitted_on(folds: tuple[int, ...]) -> list[list[int]]:
    """For the rows of each fold, the folds that the ensemble's weights are fitted on."""
    fitted = [list(folds) for _ in range(N_FOLDS)]
    for part in parts_of(folds):
        for fold in part:
            fitted[fold] = [other for other in folds if other not in part]
    return fitted


def nested_predictions(ln_predicted: np.ndarray, ln_price: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Combined ln price (N,) of each part of the rows, with weights fitted on the others."""
    combined = np.empty(len(ln_price))
    for part in parts_of(fold):
        asked = np.isin(fold, part)
        weights = fit_weights(ln_predicted[~asked], ln_price[~asked])
        combined[asked] = ln_predicted[asked] @ weights
    return combined


def inside_nested_intervals(
    ln_error: np.ndarray, difficulty: np.ndarray, fold: np.ndarray, coverage: float
) -> np.ndarray:
    """Whether each row's price lies in its interval, (N,) bool; that of a part is calibrated on the others."""
    inside = np.empty(len(ln_error), bool)
    for part in parts_of(fold):
        asked = np.isin(fold, part)
        factor = interval_half_width(ln_error[~asked], difficulty[~asked], coverage)
        inside[asked] = np.abs(ln_error[asked]) <= factor * difficulty[asked]
    return inside


def fit_ensemble(candidates: Candidates, price: np.ndarray, fold: np.ndarray) -> tuple[Ensemble, np.ndarray]:
    """The ensemble, with weights and intervals of all N rows and a nested score; and the nested ln prices (N,)."""
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
    name, value = ("leaked", score["leaked_smape"]) if leaked else ("nested", score["smape"])
    covers = ", ".join(f"{share:.1%} at nominal {level}" for level, share in score["coverage"].items())
    return (
        f"{listed.to_string(index=False, float_format='%.3f')}\n"
        f"ensemble: {name} SMAPE {value:.2f} ± {score['standard_error']:.2f} on {score['rows']} rows\n"
        f"intervals cover {covers}"
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(EnsembleSettings, argv, description=__doc__.split("\n")[0])
    workspace = Workspace(settings.workspace)
    train = workspace.training_table().set_index("sample_id")
    ids = {"train": train.index}
    if workspace.path("prepared", split="test").is_file():
        ids["test"] = pd.Index(workspace.prepared("test")["sample_id"])
    names = list(settings.members) or choose_members(workspace, ids, but=settings.run)
    candidates = read_candidates(
        workspace, names, train["fold"], ids.get("test"), allow_leak=settings.allow_leak
    )
    used = train.loc[candidates.train_ids]
    fold, price = used["fold"].to_numpy(), used["price"].to_numpy()
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
        workspace, settings.run, "train", candidates.train_ids.to_numpy(), log_price, meta=meta, fold=fold
    )
    if "test" in ids:
        out = Path(settings.out) if settings.out else None
        write_prices(workspace, settings.run, ensemble, "test", candidates.ln_predicted["test"], out)
    return summary


if __name__ == "__main__":
    run_entry_point(main)
