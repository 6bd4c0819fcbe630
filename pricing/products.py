"""Products to price, from a table with its owner's columns or from one that `data.prepare` wrote.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.catalog import FEATURE, ColumnMapping
from contracts.errors import InputError

PREPARED_COLUMNS = {
    "sample_id",
    "entity_name",
    "catalog_content",
    "text",
    "image",
    "unit_kind",
    "total_amount",
}
"""A table with all of these was written by `data.prepare`, whatever other columns it has."""

PREPARED_TEXTS = (
    "sample_id", "entity_name", "catalog_content", "text", "image_link", "image", "unit", "unit_kind",
)  # fmt: skip


@dataclass
class Products:
    """N prepared rows under numbers of their own, since the ids of a stranger's table may occur twice."""

    ids: np.ndarray
    """(N,) str, as the table has them"""
    rows: pd.DataFrame
    """prepared rows; their sample_id is the row's number"""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def without_text(self) -> np.ndarray:
        """(N,) bool"""
        written = self.rows["entity_name"] + self.rows["catalog_content"]
        return (written.str.strip() == "").to_numpy(bool)

    @property
    def without_amount(self) -> np.ndarray:
        """(N,) bool: the text states no amount that was understood."""
        return self.rows["total_amount"].isna().to_numpy(bool)


def is_prepared(table: pd.DataFrame) -> bool:
    return set(table.columns) >= PREPARED_COLUMNS


def products_of(table: pd.DataFrame, mapping: ColumnMapping, *, source: str = "table") -> Products:
    """Prepare a table.

    Args:
        table: the columns that `mapping` names, or a prepared table. Without a column of ids, the rows are numbered;
            without a column of pictures, there are none.
        mapping: of the table that the system was trained on.
        source: what errors call the table, usually its file.

    Raises:
        InputError: a mapped column is missing, or the table has no rows.
    """
    if table.empty:
        raise InputError(f"{source}: the table has no rows")
    numbers = np.arange(len(table)).astype(str)
    if is_prepared(table):
        ids = table["sample_id"].astype(str).to_numpy()
        # a fold would tell an out-of-fold encoder that these are its training rows
        rows = table.drop(columns="fold", errors="ignore").assign(sample_id=numbers)
        return Products(ids, rows.reset_index(drop=True))

    from data.prepare import prepare_table

    raw = _as_text(table)
    ids = raw[mapping.id].str.strip().to_numpy() if mapping.id in raw else numbers
    # under the row's number, two rows with one id stay two products
    raw[mapping.id] = numbers
    if mapping.image and mapping.image not in raw:
        raw[mapping.image] = ""
    prepared, _ = prepare_table(raw, mapping, with_price=False, source=source)
    return Products(ids, _as_read_back(prepared, mapping))


def _as_read_back(prepared: pd.DataFrame, mapping: ColumnMapping) -> pd.DataFrame:
    """The prepared rows as `Workspace.prepared` would read them from a file: an absent text is "", a number NaN."""
    categories = [FEATURE + name for name, kind in mapping.features.items() if kind == "category"]
    columns = {}
    for name in prepared.columns:
        values = prepared[name]
        if name in PREPARED_TEXTS or name in categories:
            columns[name] = values.fillna("")
        else:
            columns[name] = pd.to_numeric(values).astype("float64")
    return pd.DataFrame(columns).reset_index(drop=True)


def _as_text(table: pd.DataFrame) -> pd.DataFrame:
    """The table with every value as text and an absent one as "", as `contracts.tables` reads files."""
    columns = {}
    for name in table.columns:
        values = table[name]
        columns[str(name)] = values.astype(object).where(values.notna(), "").astype(str)
    return pd.DataFrame(columns).reset_index(drop=True)


def described_products(
    texts: Sequence[str],
    facts: Sequence[Mapping[str, str]],
    pictures: Sequence[Path | None],
    mapping: ColumnMapping,
) -> Products:
    """N products that come from no table.

    Args:
        texts: (N,) the whole text of each.
        facts: (N,) further facts, as they are written, by the names in `mapping.features`; any of them may be absent.
        pictures: (N,) picture files.
        mapping: of the table that the system was trained on.
    """
    table = pd.DataFrame({mapping.text[0]: list(texts)}, dtype=object)
    for name in mapping.features:
        table[name] = [written.get(name, "") for written in facts]
    # one column of text is read as it is, without labels, and without links there are no pictures
    products = products_of(table, replace(mapping, text=mapping.text[:1], image=None))
    # an absolute path stands for itself, whatever folder the pictures of tables are in
    products.rows["image"] = ["" if picture is None else str(picture.resolve()) for picture in pictures]
    return products


def one_product(text: str, mapping: ColumnMapping, image: Path | None = None) -> Products:
    """A product of which only a text and perhaps a picture file is known.

    Raises InputError when there is no such picture file.
    """
    if image is not None and not image.is_file():
        raise InputError(f"--image {image}: no such file")
    return described_products([text], [{}], [image], mapping)
