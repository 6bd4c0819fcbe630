"""Score every model of a workspace, beside the best constant, on rows that the model was not fitted on.

    python -m pipeline.scores --workspace OUT

Each prediction file says what its model was fitted on. A model is scored on the rows that are new to it, whatever its
hold-out. A file without such rows is not scored, unless `--allow-leak` asks for its number in a column called leaked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, read_json
from contracts.predictions import Predictions, prediction_names, read_predictions
from contracts.smape import best_constant, smape, smape_with_error
from contracts.splits import N_HOLDOUTS, roles
from contracts.workspace import REPOSITORY, Workspace
from training.settings import parse_settings

LABELS = {
    "clip_finetune": "CLIP price head (rows with a picture)",
    "qwen3_finetune": "text encoder's price head",
    "fusion_image_only": "fusion, images only",
    "fusion_text_only": "fusion, texts only",
    "fusion_qwen_clip": "fusion, two embeddings",
    "fusion_all_embeddings": "fusion, all embeddings",
}
"""Labels of well-known prediction files, in the order of the table; other files follow under their own names."""
CONSTANT = "constant"
BEST_POSSIBLE = "best possible"
NO_BETTER = "no better than the constant price"
"""What the column `note` says of a model whose error is not below that of the constant price on the same rows."""


@dataclass
class ScoreSettings:
    workspace: Path = REPOSITORY
    """Folder with data/ and predictions/."""
    allow_leak: bool = False
    """Also score models that have no new rows, on the rows they were fitted on, in a column called leaked SMAPE."""


def score_table(
    workspace: Workspace, test_truth: pd.Series | None = None, *, allow_leak: bool = False
) -> pd.DataFrame:
    """One line per model: its SMAPE on the training rows that are new to it, and on the test rows of known price.

    Args:
        test_truth: true price by sample_id of test.csv, which only a generated catalogue has.
        allow_leak: also give a line, with a leaked score, to models that no row is new to.
    """
    train = workspace.training_table().set_index("sample_id")
    train["constant"] = constant_prices(train)
    lines = []
    for name in sorted(prediction_names(workspace), key=_place_in_table):
        try:
            predictions = read_predictions(workspace, name, "train")
            rows = predictions.unseen
            column = "validation SMAPE"
            if not rows.any():
                if not allow_leak:
                    predictions.require_unseen()  # raises with the reason
                rows = np.ones(len(rows), bool)
                column = "leaked SMAPE"
        except InputError as reason:
            print(f"not scored: {reason}")
            continue
        line = {"model": LABELS.get(name, name), **_score(train, predictions, rows, column)}
        if test_truth is not None:
            line["test SMAPE"] = _test_score(workspace, name, test_truth)
        lines.append(line)
    table = pd.DataFrame([*_constants(train, lines, test_truth), *lines])
    first = ["model", "folds", "rows", "validation SMAPE", "±"]
    last = ["note"] if "note" in table else []
    return table[[*first, *table.columns.difference([*first, *last]), *last]]


def constant_prices(train: pd.DataFrame) -> pd.Series:
    """The best constant price for each training row: like a model, it is fitted on the fit folds of its hold-out."""
    constant = pd.Series(np.nan, train.index)
    for holdout in range(N_HOLDOUTS):
        role = roles(holdout)
        fitted = train.loc[train["fold"].isin(role.fit), "price"].to_numpy()
        constant[train["fold"].isin(role.validate)] = best_constant(fitted)
    return constant


def _place_in_table(name: str) -> tuple[int, str]:
    known = list(LABELS)
    place = known.index(name) if name in known else len(known)
    return place, name


def _score(train: pd.DataFrame, predictions: Predictions, rows: np.ndarray, column: str) -> dict:
    """Folds, number, SMAPE (under the name `column`) and standard error of `rows`, (N,) bool; a note if it is bad."""
    scored = train.loc[predictions.sample_ids[rows]]
    price = scored["price"].to_numpy()
    score, error = smape_with_error(price, predictions.price[rows])
    assert predictions.fold is not None, "the training table has folds"
    folds = sorted(set(predictions.fold[rows].tolist()))
    line = {"folds": _written(folds), "rows": len(price), column: round(score, 2), "±": round(error, 2)}
    # on these very rows: a model of pictures may price a few of the fold's rows only
    if score >= smape(price, scored["constant"].to_numpy()):
        line["note"] = NO_BETTER
    return line


def _written(folds: list[int]) -> str:
    return " ".join(map(str, folds))


def _test_score(workspace: Workspace, name: str, truth: pd.Series) -> float:
    """SMAPE on the test rows of known price; NaN where the model has not priced test.csv."""
    if not workspace.path("predictions", name=name, split="test").is_file():
        return np.nan
    predicted = read_predictions(workspace, name, "test").by_id
    known = truth.index.intersection(predicted.index)
    return round(smape(truth[known].to_numpy(), predicted[known].to_numpy()), 2)


def _constants(train: pd.DataFrame, lines: list[dict], test_truth: pd.Series | None) -> list[dict]:
    """A line of the best constant for each set of folds that a model is scored on; without a model, for hold-out 0."""
    scored_folds = {line["folds"] for line in lines if "validation SMAPE" in line}
    if not scored_folds:
        scored_folds = {_written(list(roles(0).validate))}
    constants = []
    for folds in sorted(scored_folds):
        scored = train[train["fold"].isin([int(fold) for fold in folds.split()])]
        predicted = scored["constant"]
        score, error = smape_with_error(scored["price"].to_numpy(), predicted.to_numpy())
        line = {"model": CONSTANT, "folds": folds, "rows": len(scored)}
        line |= {"validation SMAPE": round(score, 2), "±": round(error, 2)}
        if test_truth is not None:
            constant = np.full(len(test_truth), predicted.iloc[0])
            line["test SMAPE"] = round(smape(test_truth.to_numpy(), constant), 2)
        constants.append(line)
    return constants


def write_scores(root: Path, sample: Path | None = None, *, allow_leak: bool = False) -> str:
    """Write scores.csv into the workspace and return the table as text.

    Args:
        sample: folder of a generated catalogue, whose truth adds the scores on test.csv and the best possible one.
        allow_leak: as in `score_table`.
    """
    truth = None
    law = None
    if sample is not None:
        known = read_table(sample / "test_truth.csv")
        truth = pd.Series(known["price"].astype(float).to_numpy(), index=known["sample_id"])
        law = read_json(sample / "truth.json")
    workspace = Workspace(root)
    table = score_table(workspace, truth, allow_leak=allow_leak)
    if law is not None:
        best = {
            "model": BEST_POSSIBLE,
            "validation SMAPE": round(law["best_smape_expected"], 2),
            "test SMAPE": round(law["best_smape_on_test"], 2),
        }
        table = pd.concat([table, pd.DataFrame([best])], ignore_index=True)
    table["rows"] = table["rows"].astype("Int64")
    with atomic_write(workspace.path("scores")) as file:
        table.to_csv(file, index=False, float_format="%.2f")
    return table.to_string(index=False, na_rep="", justify="right", float_format="%.2f")


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ScoreSettings, argv, description=__doc__.split("\n")[0])
    print(write_scores(settings.workspace, allow_leak=settings.allow_leak))


if __name__ == "__main__":
    run_entry_point(main)
