"""The columns of the table itself as one more input of a model: numbers such as a weight, categories such as a brand.

Legend: N rows, B batch, D fused width, D_tab columns of the matrix.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch.nn.functional as F
from torch import Tensor, nn

from contracts.catalog import FEATURE
from contracts.errors import InputError
from fusion.blocks import zero_missing
from training.number_column import NumberColumn

FEWEST_ROWS = 5
"""Rows to fit that must share a category for it to get a column of its own; rarer ones share one."""

MOST_CATEGORIES = 200
"""Most columns of one feature. Categories beyond the most frequent ones count as rare."""


@dataclass
class CategoryColumn:
    """The categories of one feature among the rows to fit."""

    frequent: list[str]
    """each has a column of its own, in this order"""
    rare: list[str]
    """they share the last column"""

    @classmethod
    def fit(cls, values: pd.Series) -> CategoryColumn:
        """From the values (N,) of the rows to fit, "" where none is stated."""
        counts = values[values != ""].value_counts()
        # the most frequent first, and by name where counts are equal, so that the order of the rows has no effect
        ranked = sorted(counts.index, key=lambda category: (-counts[category], category))
        frequent = [category for category in ranked[:MOST_CATEGORIES] if counts[category] >= FEWEST_ROWS]
        return cls(sorted(frequent), sorted(ranked[len(frequent) :]))

    def columns(self, values: pd.Series) -> np.ndarray:
        """(N,) → (N, K + 1): one 1 per row; none where the category is absent or was not among the rows to fit."""
        one_hot = np.zeros((len(values), len(self.frequent) + 1))
        column = pd.Index(self.frequent, dtype=object).get_indexer(values)
        known = np.flatnonzero(column >= 0)
        one_hot[known, column[known]] = 1
        one_hot[values.isin(self.rare), -1] = 1
        return one_hot


@dataclass
class TableColumns:
    """How the `feature_<name>` columns of a prepared table become a matrix (N, D_tab)."""

    numbers: dict[str, NumberColumn]
    categories: dict[str, CategoryColumn]

    @classmethod
    def fit(cls, rows: pd.DataFrame) -> TableColumns:
        """From the prepared rows that a model is fitted on; it looks at their features and never at their prices."""
        numbers = {}
        categories = {}
        for column in feature_columns(rows):
            name = column.removeprefix(FEATURE)
            if pd.api.types.is_numeric_dtype(rows[column]):
                numbers[name] = NumberColumn.fit(_numbers(rows, name))
            else:
                categories[name] = CategoryColumn.fit(_categories(rows, name))
        return cls(numbers, categories)

    @property
    def width(self) -> int:
        """D_tab"""
        of_categories = sum(len(category.frequent) + 1 for category in self.categories.values())
        return 2 * len(self.numbers) + of_categories + 1

    def matrix(self, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """The columns of prepared rows.

        Returns:
            (N, D_tab) float32, and (N,) bool: whether the row states any feature.

        Raises:
            InputError: a feature has no column, or a number is not one.
        """
        # The branch begins with a LayerNorm, which keeps only how columns compare with each other. Beside a column
        # of ones, the size of a single number is not lost.
        blocks = [np.ones((len(rows), 1))]
        is_stated = np.zeros(len(rows), bool)
        for name, number in self.numbers.items():
            numbers = _numbers(rows, name)
            blocks.append(number.columns(numbers))
            is_stated |= np.isfinite(numbers)
        for name, category in self.categories.items():
            categories = _categories(rows, name)
            blocks.append(category.columns(categories))
            is_stated |= (categories != "").to_numpy(bool)
        return np.concatenate(blocks, axis=1).astype(np.float32), is_stated

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TableColumns:
        numbers = {name: NumberColumn(**number) for name, number in content["numbers"].items()}
        categories = {name: CategoryColumn(**category) for name, category in content["categories"].items()}
        return cls(numbers, categories)


def feature_columns(rows: pd.DataFrame) -> list[str]:
    """Names of the columns of a prepared table that hold further features."""
    return [column for column in rows.columns if column.startswith(FEATURE)]


def _values(rows: pd.DataFrame, name: str) -> pd.Series:
    if FEATURE + name not in rows:
        raise InputError(
            f"the table has no column {FEATURE}{name}, which the model reads; name {name} in --features of "
            "data.prepare"
        )
    return rows[FEATURE + name]


def _numbers(rows: pd.DataFrame, name: str) -> np.ndarray:
    """(N,) float64, NaN where nothing is stated."""
    try:
        return pd.to_numeric(_values(rows, name)).to_numpy(np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"column {FEATURE}{name}: a number is expected ({error})") from None


def _categories(rows: pd.DataFrame, name: str) -> pd.Series:
    """Text without regard to case, "" where nothing is stated."""
    return _values(rows, name).fillna("").astype(str).str.strip().str.casefold()


class TabularBranch(nn.Module):
    """LayerNorm → Linear → ReLU: 1,222 parameters for 11 fields at D = 100.

    Args:
        d_in: number of fields.
        hidden: width D of the output.
    """

    def __init__(self, *, d_in: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_in)
        self.linear = nn.Linear(d_in, hidden)

    def forward(self, fields: Tensor, valid: Tensor | None = None) -> Tensor:
        """fields (B, d_in), valid (B,) bool or None → (B, D), zero for a row without fields."""
        return zero_missing(F.relu(self.linear(self.norm(zero_missing(fields, valid)))), valid)
