"""The parsed amounts of a product as numeric columns, each group of columns under its name.

Legend: N rows.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

UNIT_KINDS = ("weight", "volume", "count", "none")
TOTAL_EDGES = np.linspace(0, 10, 21)
"""Edges between the bins of the total amount, in log1p of gram, millilitre or pieces."""
PACK_EDGES = np.log([1.5, 2.5, 3.5, 4.5, 6.5, 9, 12.5, 18, 30, 60])
"""Edges between the bins of the pack count: each between two common sizes, in ln of the count."""

MIN_DEVIATION = 1e-6
"""Added to a column's standard deviation, so that a constant column can be divided by it."""
NOT_COMPARED = ("total_amount_by_kind", "pack_count_by_kind", "total_amount_bins", "pack_count_bins")
"""Columns that repeat others in a form that a linear model needs. A similarity compares the others only."""


def amounts(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Logarithms of amounts and of text lengths, float64, (N, 1) each; by kind of unit and `unit_kind` (N, 4).

    The `_by_kind` columns are the amount where the product has that kind of unit and 0 elsewhere, so that a linear
    model can learn one slope per gram and another per piece.
    """
    total = _log1p_or_zero(table["total_amount"])
    item = _log1p_or_zero(table["item_size"])
    pack = _column(np.log(table["pack_count"]))
    # one-hot; a rare kind of unit, such as a length, has no column
    kinds = np.stack([(table["unit_kind"] == kind).to_numpy(float) for kind in UNIT_KINDS], axis=1)
    return {
        "total_amount": total,
        "pack_count": pack,
        "item_size": item,
        "quantity_value": _column(table["quantity_value"]),
        "text_length": _column(np.log1p(table["catalog_content"].str.len())),
        "title_length": _column(np.log1p(table["entity_name"].str.len())),
        "total_amount_by_kind": kinds * total,
        "pack_count_by_kind": kinds * pack,
        "unit_kind": kinds,
    }


def amount_bins(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """One-hot bins of total amount, (N, 22), and pack count, (N, 11): a price need not be linear in either."""
    total = _log1p_or_zero(table["total_amount"])[:, 0]
    pack = np.log(table["pack_count"].to_numpy())
    return {
        "total_amount_bins": _one_hot(np.digitize(total, TOTAL_EDGES), len(TOTAL_EDGES) + 1),
        "pack_count_bins": _one_hot(np.digitize(pack, PACK_EDGES), len(PACK_EDGES) + 1),
    }


def columns_of(named: dict[str, np.ndarray], first: int = 0) -> dict[str, slice]:
    """Where each group stands when the groups are stacked side by side from column `first` on."""
    columns = {}
    for name, values in named.items():
        columns[name] = slice(first, first + values.shape[1])
        first += values.shape[1]
    return columns


def _column(values: pd.Series) -> np.ndarray:
    return values.to_numpy()[:, None]


def _log1p_or_zero(values: pd.Series) -> np.ndarray:
    """(N, 1); 0 where the text states no amount."""
    return _column(np.log1p(values.fillna(0)))


def _one_hot(bins: np.ndarray, count: int) -> np.ndarray:
    return np.eye(count)[bins]
