"""A catalogue as people have it, and as every stage reads it.

People name their columns as they like: a `ColumnMapping` says which column is the id, which hold text, and which hold
the price, the link of the picture, and further facts. What comes out always has the columns sample_id,
catalog_content, image_link, `feature_<name>` of each further fact and, with prices, price.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from contracts.errors import InputError, listed
from contracts.tables import read_any

TEXT_COLUMNS = ("sample_id", "catalog_content", "image_link")
FEATURE = "feature_"
"""Prefix of the columns that hold further facts."""
FeatureKind = Literal["number", "category"]


@dataclass(frozen=True)
class ColumnMapping:
    """Which columns of a table hold what; the defaults are those of the reference task."""

    id: str = "sample_id"
    text: tuple[str, ...] = ("catalog_content",)
    """several are joined, each behind its name"""
    price: str = "price"
    image: str | None = "image_link"
    """link or file name of the picture; None where a catalogue has no pictures"""
    features: dict[str, FeatureKind | None] = field(default_factory=dict)
    """columns with further facts; None: not known yet, the training table decides"""
    decimal: str = "."
    """what stands before the cents of a price"""
    currency: str = "$"
    """how prices are labelled"""

    @classmethod
    def parse(
        cls, columns: Sequence[str], *, features: Sequence[str] = (), decimal: str = ".", currency: str = "$"
    ) -> ColumnMapping:
        """The mapping that settings name.

        Args:
            columns: such as ["id=sku", "text=title,description", "price=sell_price", "image=image_url"]; without any,
                the columns of the reference task. A catalogue whose mapping has no image has no pictures.

        Raises:
            InputError: an unknown or repeated role, a role without a column, or one column in two roles.
        """
        if decimal not in (".", ","):
            raise InputError(f"--decimal {decimal}: choose . or ,")
        roles: dict[str, str] = {}
        for entry in columns:
            role, _, column = entry.partition("=")
            if role not in ("id", "text", "price", "image") or not column.strip(" ,"):
                raise InputError(
                    f"--columns {entry}: write id=, text=, price= or image= and the name of a column"
                )
            if role in roles:
                raise InputError(
                    f"--columns {entry}: two columns claim to be the {role}: {roles[role]}, {column}"
                )
            roles[role] = column.strip()
        mapping = cls(
            id=roles.get("id", cls.id),
            text=tuple(roles["text"].split(",")) if "text" in roles else cls.text,
            price=roles.get("price", cls.price),
            image=roles.get("image") if columns else cls.image,
            features={name: None for name in features},
            decimal=decimal,
            currency=currency,
        )
        used = [
            mapping.id,
            *mapping.text,
            mapping.price,
            *([mapping.image] if mapping.image else []),
            *features,
        ]
        repeated = sorted({column for column in used if used.count(column) > 1})
        if repeated:
            raise InputError(f"--columns: column {', '.join(repeated)} has two roles")
        return mapping

    def to_json(self) -> dict[str, Any]:
        """As it stands in data/catalog.json."""
        content = asdict(self)
        columns = {role: content.pop(role) for role in ("id", "text", "price", "image")}
        return {"columns": columns, **content}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ColumnMapping:
        """From data/catalog.json; one that is older than mappings has the columns of the reference task."""
        columns = dict(content.get("columns", {}))
        if "text" in columns:
            columns["text"] = tuple(columns["text"])
        others = {name: content[name] for name in ("features", "decimal", "currency") if name in content}
        return cls(**columns, **others)


@dataclass
class CatalogReport:
    """What reading a table found; part of data/catalog.json."""

    rows: int = 0
    identical_duplicates_dropped: int = 0
    input_ids: list[str] = field(default_factory=list)
    """id of every line of the table; empty where each product has one line"""
    bad_prices_skipped: dict[str, str] = field(default_factory=dict)
    """sample_id to the price as written"""
    unread_features: dict[str, int] = field(default_factory=dict)
    """rows of each number feature whose value is no number"""
    empty_texts: int = 0
    without_image_link: int = 0


def read_table(path: Path, **options) -> pd.DataFrame:
    """Read one of our own csv files with every column as text."""
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
    path: Path | str,
    *,
    with_price: bool,
    skip_bad_prices: bool = False,
    mapping: ColumnMapping | None = None,
) -> tuple[pd.DataFrame, CatalogReport]:
    """Read a catalogue in any format of `contracts.tables` and bring it into the columns that stages read.

    Returns and raises as `map_catalog`.
    """
    table, _, report = map_catalog(
        read_any(path),
        str(path),
        mapping or ColumnMapping(),
        with_price=with_price,
        skip_bad_prices=skip_bad_prices,
    )
    return table, report


def map_catalog(
    raw: pd.DataFrame,
    source: str,
    mapping: ColumnMapping,
    *,
    with_price: bool,
    skip_bad_prices: bool = False,
) -> tuple[pd.DataFrame, ColumnMapping, CatalogReport]:
    """Validate a table of texts and bring it into the columns that stages read.

    Args:
        raw: every column str.
        source: what errors call the table, usually its file.
        with_price: whether the price column is required and read.

    Returns:
        The rows in file order (text columns str, price float64, number features float64), the mapping with the kind
        of every feature, and the report.

    Raises:
        InputError: a missing column, no rows, an empty id, one id with two contents, or a price that is not a finite
            number above 0 (unless `skip_bad_prices`).
    """
    table = _chosen_columns(raw, source, mapping, with_price)
    table["sample_id"] = table["sample_id"].str.strip()
    if (table["sample_id"] == "").any():
        row = int(np.flatnonzero(table["sample_id"] == "")[0]) + 1
        raise InputError(f"{source}: data row {row} has an empty {mapping.id}")

    report = CatalogReport()
    input_ids = table["sample_id"].tolist()
    table = table.drop_duplicates(ignore_index=True)
    report.identical_duplicates_dropped = len(input_ids) - len(table)
    if report.identical_duplicates_dropped:
        report.input_ids = input_ids
    conflicting = table.loc[table["sample_id"].duplicated(), "sample_id"].unique()
    if len(conflicting):
        raise InputError(f"{source}: one {mapping.id} with different contents: {listed(conflicting)}")

    if with_price:
        table, report.bad_prices_skipped = _parse_prices(source, table, mapping, skip_bad_prices)
    table, mapping, report.unread_features = _parse_features(table, mapping)
    report.rows = len(table)
    report.empty_texts = int((table["catalog_content"].str.strip() == "").sum())
    report.without_image_link = int((table["image_link"].str.strip() == "").sum())
    return table, mapping, report


def _chosen_columns(raw: pd.DataFrame, source: str, mapping: ColumnMapping, with_price: bool) -> pd.DataFrame:
    wanted = [mapping.id, *mapping.text]
    wanted += [mapping.image] if mapping.image else []
    wanted += [mapping.price] if with_price else []
    wanted += list(mapping.features)
    missing = [column for column in wanted if column not in raw.columns]
    if missing:
        raise InputError(
            f"{source}: column {', '.join(missing)} is missing; found {', '.join(raw.columns)}; "
            "--columns says which column is which"
        )
    if raw.empty:
        raise InputError(f"{source}: the table has no rows")
    table = pd.DataFrame({"sample_id": raw[mapping.id], "catalog_content": _joined_texts(raw, mapping.text)})
    table["image_link"] = raw[mapping.image] if mapping.image else ""
    for name in mapping.features:
        table[FEATURE + name] = raw[name]
    if with_price:
        table["price"] = raw[mapping.price]
    return table


def _joined_texts(raw: pd.DataFrame, columns: tuple[str, ...]) -> pd.Series:
    """One text per row; of several columns those that are not empty, each on a line of its own behind its name.

    The first one is the name of the product, which all stages look for behind "Item Name:".
    """
    if len(columns) == 1:
        return raw[columns[0]]
    labels = ["Item Name", *columns[1:]]
    rows = zip(*(raw[column] for column in columns), strict=True)
    return pd.Series(
        [
            "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True) if text.strip())
            for texts in rows
        ],
        index=raw.index,
        dtype=str,
    )


def parse_price(written: str, decimal: str = ".") -> float:
    """The number in a price as people write it: "$4.89", "1,312.00", "4,89 €" (decimal ","). NaN if there is none.

    A separator that cannot be one of thousands is not guessed at: "4,89" with decimal "." is NaN.
    """
    thousands = "," if decimal == "." else "."
    found = re.fullmatch(r"[^\d+\-.,]*([+-]?[\d.,'’ \u00a0\u202f]*)[^\d+\-.,]*", written.strip())
    if not found:
        return _plain_number(written)
    number = re.sub(r"['’ \u00a0\u202f]", thousands, found[1].strip())
    grouped = rf"[+-]?(?:\d{{1,3}}(?:{re.escape(thousands)}\d{{3}})+|\d*)(?:{re.escape(decimal)}\d*)?"
    if not re.fullmatch(grouped, number) or not re.search(r"\d", number):
        return _plain_number(written) if decimal == "." else float("nan")
    return float(number.replace(thousands, "").replace(decimal, "."))


def _plain_number(written: str) -> float:
    """What a program would have written, such as 1e3."""
    try:
        return float(written)
    except ValueError:
        return float("nan")


def _parse_prices(
    source: str, table: pd.DataFrame, mapping: ColumnMapping, skip: bool
) -> tuple[pd.DataFrame, dict[str, str]]:
    price = np.array([parse_price(written, mapping.decimal) for written in table["price"]])
    usable = np.isfinite(price) & (price > 0)
    bad = dict(zip(table.loc[~usable, "sample_id"], table.loc[~usable, "price"], strict=True))
    if bad and not skip:
        rows = [f"{sample_id} ({written!r})" for sample_id, written in bad.items()]
        other = "," if mapping.decimal == "." else "."
        raise InputError(
            f"{source}: {mapping.price} is not a finite number above 0 for {mapping.id} {listed(rows)}; "
            f"--skip-bad-prices drops them, --decimal {other} reads 4{other}89"
        )
    if not usable.any():
        raise InputError(f"{source}: no row has a usable price")
    return table.assign(price=price)[usable].reset_index(drop=True), bad


def _parse_features(
    table: pd.DataFrame, mapping: ColumnMapping
) -> tuple[pd.DataFrame, ColumnMapping, dict[str, int]]:
    """Number features as float64, NaN where nothing or no number is written; categories stay text."""
    kinds: dict[str, FeatureKind | None] = {}
    unread = {}
    table = table.copy()
    for name, kind in mapping.features.items():
        written = table[FEATURE + name].str.strip()
        stated = written != ""
        number = np.array([parse_price(text, mapping.decimal) if text else np.nan for text in written])
        if kind is None:
            # one exception in a hundred is a slip of the pen, more are names
            is_number = stated.any() and np.isfinite(number[stated]).mean() >= 0.99
            kind = "number" if is_number else "category"
        kinds[name] = kind
        if kind == "category":
            table[FEATURE + name] = written
            continue
        table[FEATURE + name] = np.where(np.isfinite(number), number, np.nan)
        if wrong := int((stated & ~np.isfinite(number)).sum()):
            unread[name] = wrong
    return table, replace(mapping, features=kinds), unread
