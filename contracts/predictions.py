"""The prediction file: what a price model hands to the ensemble, the score table and the report.

`predictions/<name>_<split>.csv` has one row per product: sample_id, log_price (log1p of dollars) and, in train, fold.
Beside it `<file>.json` says what the model was fitted on: `fitted_on` lists, for the rows of each fold, the folds that
the model which priced them had seen, its encoders included. A score is honest on rows whose own fold is not in that
list, and on no others. The json also holds the hash of the folds, the sha256 of the csv and the command.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import InputError, listed
from contracts.files import atomic_write, read_versioned, sha256_file, sidecar_of, write_json
from contracts.smape import SMALLEST_PRICE
from contracts.splits import N_FOLDS, leaked_folds, split_hash
from contracts.workspace import Workspace

SCHEMA = 1
REQUIRED_META = ("stage", "model", "fitted_on")
LEAK_REMEDY = (
    "use an out-of-fold run, predict its validation rows only, or --allow-leak for a number called leaked"
)


@dataclass
class Predictions:
    """The prices that one model gave to the rows of one table."""

    path: Path
    sample_ids: np.ndarray
    """(N,) str"""
    log_price: np.ndarray
    """(N,) float64, log1p of dollars"""
    fold: np.ndarray | None
    """(N,) int from data/folds.csv, None in test"""
    meta: dict[str, Any] | None
    """None for a file from before sidecars existed: nothing is known of what its model was fitted on"""

    @property
    def price(self) -> np.ndarray:
        """(N,) dollars, at least one cent."""
        return np.maximum(np.expm1(self.log_price), SMALLEST_PRICE)

    @property
    def by_id(self) -> pd.Series:
        """Price in dollars, indexed by sample_id."""
        return pd.Series(self.price, index=self.sample_ids, name="price")

    @property
    def unseen(self) -> np.ndarray:
        """(N,) bool: training rows that neither the model nor an encoder behind it was fitted on."""
        if self.meta is None:
            return np.zeros(len(self.sample_ids), bool)
        assert self.fold is not None, "only training rows have folds"
        leaked = leaked_folds(self.meta["fitted_on"], tuple(range(N_FOLDS)))
        return ~np.isin(self.fold, leaked)

    def require_unseen(self) -> None:
        """Raise InputError unless every row is new to the model that priced it."""
        if self.meta is None:
            raise InputError(
                f"{self.path}: no {sidecar_of(self.path).name} says what its model was fitted on; predict again, "
                "or --allow-leak for a number called leaked"
            )
        if not self.unseen.all():
            assert self.fold is not None
            folds = sorted(set(self.fold[~self.unseen].tolist()))
            raise InputError(
                f"{self.path}: no honest score: its model was fitted on rows of folds {folds} that it predicts; "
                + LEAK_REMEDY
            )


def write_predictions(
    workspace: Workspace,
    name: str,
    split: str,
    sample_ids: np.ndarray,
    log_price: np.ndarray,
    *,
    meta: dict[str, Any],
    fold: np.ndarray | None = None,
) -> Path:
    """Write predictions/<name>_<split>.csv and its json.

    Args:
        sample_ids: (N,) str, each once.
        log_price: (N,) log1p of dollars.
        meta: `stage` (the module that wrote it), `model` (run or kind of model), `fitted_on` (a list for each of the
            ten folds; `contracts.splits.fitted_on`, `fitted_out_of_fold` and `union_fitted_on` make it) and more.
        fold: (N,) int of training rows.

    Raises:
        InputError: an entry of meta is missing, or a price is not a finite number.
    """
    path = workspace.path("predictions", name=name, split=split)
    if missing := [key for key in REQUIRED_META if key not in meta]:
        raise InputError(f"{path}: prediction meta lacks {', '.join(missing)}")
    if len(meta["fitted_on"]) != N_FOLDS:
        raise InputError(f"{path}: meta fitted_on must list the fitted folds for each of {N_FOLDS} folds")
    log_price = np.asarray(log_price, np.float64)
    if not np.isfinite(log_price).all():
        unusable = np.asarray(sample_ids)[~np.isfinite(log_price)].tolist()
        raise InputError(f"{path}: the price of sample_id {listed(unusable)} is not finite")
    table = pd.DataFrame({"sample_id": sample_ids, "log_price": log_price})
    if fold is not None:
        table["fold"] = fold
    # a crash between the two renames leaves a csv of unknown origin rather than one with a wrong origin
    sidecar_of(path).unlink(missing_ok=True)
    with atomic_write(path) as file:
        table.to_csv(file, index=False)
    write_json(
        sidecar_of(path),
        {
            "schema": SCHEMA,
            "name": name,
            "split": split,
            **meta,
            "split_hash": split_hash(workspace.folds()),
            "rows": len(table),
            "sha256": sha256_file(path),
            "command": " ".join(sys.argv),
        },
    )
    return path


def write_in_input_order(workspace: Workspace, split: str, prices: pd.DataFrame, path: Path) -> None:
    """Write the prices of a table, one line for every line of its input, in the input's order.

    Args:
        prices: sample_id (each product once), price (dollars) and, for intervals, their bounds.

    Raises:
        InputError: a product of the input has no price, or one that is not a finite number above 0.
    """
    lines = prices.set_index("sample_id").reindex(workspace.input_ids(split))
    usable = np.isfinite(lines["price"]) & (lines["price"] > 0)
    if not usable.all():
        raise InputError(f"{path}: no price above 0 for sample_id {listed(lines.index[~usable].tolist())}")
    with atomic_write(path) as file:
        lines.to_csv(file)


def remove_predictions(workspace: Workspace, name: str, split: str) -> None:
    """Remove a prediction file of this name, so that an older model's prices do not pass for the new one's."""
    path = workspace.path("predictions", name=name, split=split)
    path.unlink(missing_ok=True)
    sidecar_of(path).unlink(missing_ok=True)


def read_predictions(workspace: Workspace, name: str, split: str) -> Predictions:
    """Read one prediction file and, in train, look up the fold of each row.

    Raises:
        InputError: no such file, columns or numbers that do not fit, an id that occurs twice or has no fold, or a
            file that was changed after it was written or was made with another fold file.
    """
    path = workspace.path("predictions", name=name, split=split)
    table = read_table(path)
    if not {"sample_id", "log_price"} <= set(table.columns):
        raise InputError(
            f"{path}: not a prediction file (sample_id, log_price); found {', '.join(table.columns)}"
        )
    if (repeated := table["sample_id"].duplicated()).any():
        raise InputError(f"{path}: sample_id {table['sample_id'][repeated].iloc[0]} occurs twice")
    log_price = pd.to_numeric(table["log_price"], errors="coerce").to_numpy(np.float64)
    if not np.isfinite(log_price).all():
        unusable = table["sample_id"][~np.isfinite(log_price)].tolist()
        raise InputError(f"{path}: log_price of sample_id {listed(unusable)} is not a finite number")
    meta = _read_meta(path, workspace)
    fold = _folds_of(path, workspace, table["sample_id"]) if split == "train" else None
    return Predictions(path, table["sample_id"].to_numpy(np.str_), log_price, fold, meta)


def prediction_names(workspace: Workspace, split: str = "train") -> list[str]:
    """Names of the models that have predicted this table, in alphabetical order."""
    ending = f"_{split}.csv"
    folder = workspace.path("predictions", name="any", split=split).parent
    return sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))


def _read_meta(path: Path, workspace: Workspace) -> dict[str, Any] | None:
    if not sidecar_of(path).is_file():
        return None
    meta = read_versioned(sidecar_of(path), SCHEMA, "predict again")
    if meta.get("sha256") != sha256_file(path):
        raise InputError(
            f"{path}: sha256 differs from {sidecar_of(path).name}; the file was changed, predict again"
        )
    if meta.get("split_hash") != split_hash(workspace.folds()):
        raise InputError(f"{path}: made with another fold file than data/folds.csv; predict again")
    return meta


def _folds_of(path: Path, workspace: Workspace, sample_ids: pd.Series) -> np.ndarray:
    folds = workspace.folds().reindex(sample_ids)
    if folds.isna().any():
        raise InputError(f"{path}: sample_id {folds.index[folds.isna()][0]} has no fold in data/folds.csv")
    return folds.to_numpy(int)
