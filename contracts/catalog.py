"""The raw catalogue: sample_id, catalog_content, image_link and, in train.csv, price."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.errors import InputError

TEXT_COLUMNS = ("sample_id", "catalog_content", "image_link")


@dataclass
class CatalogReport:
    """What reading a table found; part of data/catalog.json."""

    rows: int = 0
    identical_duplicates_dropped: int = 0
    bad_prices_skipped: dict[str, str] = field(default_factory=dict)
    """sample_id to the price as written"""
    empty_texts: int = 0
    without_image_link: int = 0


def read_table(path: Path, **options) -> pd.DataFrame:
    """Read a csv with every column as text, so that id 007 and a product named "NA" stay what they are."""
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8", **options)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: the file is empty") from None
    except pd.errors.ParserError as error:
        raise InputError(f"{path}: not a csv table ({str(error).strip()})") from None


def read_catalog(
    path: Path | str, *, with_price: bool, skip_bad_prices: bool = False
) -> tuple[pd.DataFrame, CatalogReport]:
    """Read and validate a catalogue.

    Returns:
        The rows in file order (text columns str, price float64 when `with_price`) and the report.

    Raises:
        InputError: missing file or column, no rows, an empty id, one id with two contents, or a price that is
            not a finite number above 0 (unless `skip_bad_prices`).
    """
    path = Path(path)
    table = read_table(path)
    columns = [*TEXT_COLUMNS, "price"] if with_price else list(TEXT_COLUMNS)
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(f"{path}: column {', '.join(missing)} is missing; found {', '.join(table.columns)}")
    table = table[columns]
    if table.empty:
        raise InputError(f"{path}: the table has no rows")
    table["sample_id"] = table["sample_id"].str.strip()
    if (table["sample_id"] == "").any():
        line = int(np.flatnonzero(table["sample_id"] == "")[0]) + 1
        raise InputError(f"{path}: data row {line} has an empty sample_id")

    report = CatalogReport()
    before = len(table)
    table = table.drop_duplicates(ignore_index=True)
    report.identical_duplicates_dropped = before - len(table)
    conflicting = table.loc[table["sample_id"].duplicated(), "sample_id"].unique()
    if len(conflicting):
        raise InputError(f"{path}: one sample_id with different contents: {_some(conflicting)}")

    if with_price:
        table, report.bad_prices_skipped = _parse_prices(path, table, skip_bad_prices)
    report.rows = len(table)
    report.empty_texts = int((table["catalog_content"].str.strip() == "").sum())
    report.without_image_link = int((table["image_link"].str.strip() == "").sum())
    return table, report


def _parse_prices(path: Path, table: pd.DataFrame, skip: bool) -> tuple[pd.DataFrame, dict[str, str]]:
    price = pd.to_numeric(table["price"], errors="coerce").to_numpy(np.float64)
    usable = np.isfinite(price) & (price > 0)
    bad = dict(zip(table.loc[~usable, "sample_id"], table.loc[~usable, "price"], strict=True))
    if bad and not skip:
        listed = _some([f"{sample_id} ({written!r})" for sample_id, written in bad.items()])
        raise InputError(
            f"{path}: price is not a finite number above 0 for sample_id {listed}; --skip-bad-prices drops them"
        )
    if not usable.any():
        raise InputError(f"{path}: no row has a usable price")
    return table.assign(price=price)[usable].reset_index(drop=True), bad


def _some(items, limit: int = 10) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
