"""One fold assignment for every stage.

Rows are dealt into ten folds, stratified by price quantile; rows that share a picture or a text are one group
and never separated. Hold-out k of five validates on folds 2k and 2k+1, stops early on the next fold and fits on
the other seven, so the number that is reported comes from rows that neither fitting nor stopping has seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import InputError
from contracts.files import atomic_write

N_FOLDS = 10
N_HOLDOUTS = 5
PRICE_QUANTILES = 10


@dataclass(frozen=True)
class Roles:
    """Which folds fit, stop and validate."""

    fit: tuple[int, ...]
    stop: tuple[int, ...]
    validate: tuple[int, ...]

    @property
    def fitted_on(self) -> tuple[int, ...]:
        """Folds a model has seen: stopping early on rows is a mild way of fitting them."""
        return tuple(sorted(self.fit + self.stop))


def roles(holdout: int | None, holdouts: int = N_HOLDOUTS) -> Roles:
    """Roles for one of `holdouts` hold-outs, 0 to 4; None (--holdout null) validates on nothing, for a final model."""
    if holdout is None:
        return Roles(fit=tuple(range(1, N_FOLDS)), stop=(0,), validate=())
    if holdouts not in (2, 5, 10):
        raise InputError(f"--folds {holdouts}: ten folds are dealt into 2, 5 or 10 hold-outs")
    if not 0 <= holdout < holdouts:
        raise InputError(f"--holdout {holdout}: must be 0 to {holdouts - 1}, or null")
    size = N_FOLDS // holdouts
    validate = tuple(range(size * holdout, size * (holdout + 1)))
    stop = ((validate[-1] + 1) % N_FOLDS,)
    fit = tuple(fold for fold in range(N_FOLDS) if fold not in validate + stop)
    return Roles(fit, stop, validate)


def group_rows(*keys: pd.Series) -> np.ndarray:
    """Group number of each row, (N,) int: rows equal in any one key (empty keys match nothing) share a group."""
    parent = np.arange(len(keys[0]))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for key in keys:
        first_row: dict[str, int] = {}
        for row, value in enumerate(key):
            if value:
                parent[root(row)] = root(first_row.setdefault(value, row))
    return np.array([root(row) for row in range(len(parent))])


def assign_folds(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Deal the prepared training rows (sample_id, catalog_content, image, price) into folds.

    Returns:
        DataFrame sample_id, fold (int, 0 to 9), in the order of `table`.
    """
    words = table["catalog_content"].str.lower().str.split().str.join(" ")
    groups = group_rows(table["image"], words)
    if len(np.unique(groups)) < N_FOLDS:
        raise InputError(
            f"train.csv: {len(np.unique(groups))} distinct products, at least {N_FOLDS} are needed for folds"
        )
    quantile = pd.qcut(
        table["price"].rank(method="first"), min(PRICE_QUANTILES, len(table) // N_FOLDS), labels=False
    )
    fold = deal(quantile.to_numpy(), groups, seed)
    return pd.DataFrame({"sample_id": table["sample_id"].to_numpy(), "fold": fold})


def deal(strata: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Deal N rows into the ten folds: (N,) int.

    Args:
        strata: (N,) what should be spread evenly over the folds, such as a class or a quantile of the price.
        groups: (N,) int; the rows of a group stay together.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    fold = np.full(len(strata), -1)
    dealer = StratifiedGroupKFold(n_splits=N_FOLDS, shuffle=True, random_state=seed)
    for number, (_, rows) in enumerate(dealer.split(np.zeros(len(strata)), strata, groups)):
        fold[rows] = number
    return fold


def write_folds(path: Path, folds: pd.DataFrame) -> None:
    with atomic_write(path) as file:
        folds.to_csv(file, index=False)


def read_folds(path: Path) -> pd.Series:
    """Fold of each training row: Series of int indexed by sample_id (str)."""
    table = read_table(path)
    if list(table.columns) != ["sample_id", "fold"] or not table["fold"].str.fullmatch("[0-9]").all():
        raise InputError(f"{path}: not a fold file (sample_id, fold 0 to 9); run data.prepare again")
    if (repeated := table["sample_id"].duplicated()).any():
        raise InputError(f"{path}: sample_id {table['sample_id'][repeated].iloc[0]} has two folds")
    return pd.Series(table["fold"].astype(int).to_numpy(), index=table["sample_id"], name="fold")


def split_hash(folds: pd.Series) -> str:
    """Identifies the fold assignment, whatever the order of rows; stands in every embedding file's meta."""
    lines = sorted(f"{sample_id},{fold}" for sample_id, fold in folds.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def fitted_on(*, encoder_folds: tuple[int, ...]) -> list[list[int]]:
    """The meta entry of a file made by one model: for the rows of each fold, the folds that the model was fitted on."""
    return [list(encoder_folds) for _ in range(N_FOLDS)]


def fitted_out_of_fold(holdouts: int) -> list[list[int]]:
    """The meta entry of a file whose rows come from the model of their own hold-out, which has not seen them."""
    size = N_FOLDS // holdouts
    return [list(roles(fold // size, holdouts).fitted_on) for fold in range(N_FOLDS)]


def union_fitted_on(*entries: list[list[int]]) -> list[list[int]]:
    """For each fold, the folds that any of several models was fitted on: a model and the encoders behind it."""
    return [sorted(set().union(*of_fold)) for of_fold in zip(*entries, strict=True)]


def leaked_folds(meta_fitted_on: list[list[int]], validate: tuple[int, ...]) -> list[int]:
    """Those of the `validate` folds whose rows were made by a model that had been fitted on them."""
    return [fold for fold in validate if fold in meta_fitted_on[fold]]
