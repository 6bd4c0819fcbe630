"""Further facts of a product: the columns `feature_<name>` of a prepared table, numbers such as a weight and categories
such as a brand. data/catalog.json says which kind each one has.

Legend: N rows, K categories of one fact.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sparse

from contracts.catalog import FEATURE, ColumnMapping, FeatureKind
from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.workspace import Workspace
from training.number_column import NumberColumn

MIN_PRODUCTS = 2
"""Training rows that must share a category. What is said of one product alone teaches nothing about another."""


def fact_kinds(workspace: Workspace) -> dict[str, FeatureKind]:
    """The further facts of the workspace's catalogue: their names and kinds."""
    mapping = ColumnMapping.from_json(read_json(workspace.path("catalog")))
    return {name: kind for name, kind in mapping.features.items() if kind is not None}


@dataclass
class Facts:
    """What the training rows say of each fact."""

    numbers: dict[str, NumberColumn]
    categories: dict[str, list[str]]
    """of each fact the categories that become terms, in the order of their columns"""

    @classmethod
    def fit(cls, table: pd.DataFrame, kinds: dict[str, FeatureKind]) -> Facts:
        """From the prepared training rows. Raises InputError for a fact without a column."""
        numbers = {}
        categories = {}
        for name, kind in kinds.items():
            if kind == "number":
                numbers[name] = NumberColumn.fit(_number(table, name))
            else:
                rows_of_category = _category(table, name).value_counts()
                shared = rows_of_category.index[rows_of_category >= MIN_PRODUCTS]
                categories[name] = sorted(category for category in shared if category)
        return cls(numbers, categories)

    def columns(self, table: pd.DataFrame) -> dict[str, np.ndarray]:
        """The numbers as structural columns, (N, 2) each, under the names of their columns in the table."""
        return {FEATURE + name: fact.columns(_number(table, name)) for name, fact in self.numbers.items()}

    def terms(self, table: pd.DataFrame) -> dict[str, sparse.csr_matrix]:
        """The categories as blocks of terms under the names of their columns, (N, K) each.

        A row has one 1 in each block; it is zero where its category is not known. A fact without any category that
        products share has no block.
        """
        blocks = {}
        for name, known in self.categories.items():
            if not known:
                continue
            column = pd.Index(known).get_indexer(_category(table, name))
            rows = np.flatnonzero(column >= 0)
            ones = np.ones(len(rows), np.float32)
            blocks[FEATURE + name] = sparse.csr_matrix((ones, (rows, column[rows])), (len(table), len(known)))
        return blocks

    def term_names(self) -> list[str]:
        """Names of all categories, such as "brand=acme", in the order of their columns."""
        return [f"{name}={category}" for name, known in self.categories.items() for category in known]

    def save(self, folder: Path) -> None:
        write_json(folder / "facts.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Facts:
        content = read_json(folder / "facts.json")
        numbers = {name: NumberColumn(**fact) for name, fact in content["numbers"].items()}
        return cls(numbers, content["categories"])


def _values(table: pd.DataFrame, name: str) -> pd.Series:
    if FEATURE + name not in table:
        raise InputError(
            f"the table has no column {FEATURE}{name}, which the model reads; name {name} in --features of "
            "data.prepare"
        )
    return table[FEATURE + name]


def _number(table: pd.DataFrame, name: str) -> np.ndarray:
    """(N,) float64, NaN where nothing is stated."""
    values = _values(table, name)
    try:
        return pd.to_numeric(values.mask(values == "")).to_numpy(np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"column {FEATURE}{name}: a number is expected ({error})") from None


def _category(table: pd.DataFrame, name: str) -> pd.Series:
    """Text without regard to case; "" where nothing is stated."""
    return _values(table, name).fillna("").astype(str).str.strip().str.casefold()
