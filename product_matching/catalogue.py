"""A catalogue to match: its columns, its checks, and the text that an encoder reads of each record."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import InputError
from product_matching.config import MAX_CHARACTERS

COLUMNS = ("id", "title", "brand", "model", "category", "description", "price", "upc")
_MODEL_NUMBER = re.compile(r"(?=.*[a-z])(?=.*\d)\w{5,}")


def product_text(table: pd.DataFrame, *, plain: bool = False) -> list[str]:
    """What the encoder reads of each record: title, brand, model number.

    The brand is left out where the title has it. The model number is squeezed to letters and digits, as shops
    write TF-TV 1022 and tftv1022; where the field is empty it is the longest such word of the title.

    Args:
        plain: join the fields as they are written, the text that published base scores refer to.
    """
    join = _plain_text if plain else _text
    return [join(*fields) for fields in zip(table["title"], table["brand"], table["model"], strict=True)]


def _plain_text(title: str, brand: str, model: str) -> str:
    return " ".join(field for field in (title, brand, model) if field)


def _text(title: str, brand: str, model: str) -> str:
    if brand.lower() in title.lower():
        brand = ""
    return _plain_text(brand, title, _squeeze(model) or model_number(title))


def model_number(title: str) -> str:
    """The longest word of at least five letters and digits that has both, or ""."""
    words = (_squeeze(word) for word in title[:MAX_CHARACTERS].lower().split())
    return max((word for word in words if _MODEL_NUMBER.fullmatch(word)), key=len, default="")


def _squeeze(written: str) -> str:
    return re.sub(r"[\W_]", "", written.lower())


def read_catalogue(path: Path | str) -> pd.DataFrame:
    """Read a catalogue csv: columns id and title are required, the others of `COLUMNS` optional, all kept as text.

    Raises InputError: no such file, not UTF-8, no rows, a column missing, an id empty or used twice, no title.
    """
    table = read_table(Path(path))
    if missing := {"id", "title"} - set(table.columns):
        raise InputError(
            f"{path}: column {', '.join(sorted(missing))} is missing; found {', '.join(table.columns)}"
        )
    return check_catalogue(table, path)


def check_catalogue(table: pd.DataFrame, name: Path | str) -> pd.DataFrame:
    """The catalogue with exactly the columns of `COLUMNS`; raises InputError as `read_catalogue` does."""
    if table.empty:
        raise InputError(f"{name}: the catalogue has no rows")
    table = table.reindex(columns=list(COLUMNS), fill_value="").apply(lambda column: column.str.strip())
    for column in ("id", "title"):
        if (empty := table[column] == "").any():
            raise InputError(f"{name}: data row {int(np.flatnonzero(empty)[0]) + 1} has an empty {column}")
    if (repeated := table["id"].duplicated()).any():
        first = table.loc[repeated, "id"].iloc[0]
        raise InputError(f"{name}: id {first} occurs twice ({repeated.sum()} repeated ids in all)")
    return table.reset_index(drop=True)
