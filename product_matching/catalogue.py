"""A catalogue to match: its columns, its checks, and the text of each record that an encoder reads."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import InputError
from product_matching.config import MAX_CHARACTERS

COLUMNS = ("id", "title", "brand", "model", "category", "description", "price", "upc")
PAIR_FIELDS = ("title", "brand", "model", "price", "category", "description")
"""Fields that a cross-encoder reads, in this order: what lies beyond its number of tokens is cut off."""
PAIR_FIELD_CHARACTERS = 600
"""Characters of a field that its tokenizer sees; 96 tokens are some 400."""

# Shorter words of letters and digits are mostly sizes and amounts, such as 32in or 8mp.
_MODEL_NUMBER = re.compile(r"(?=.*[a-z])(?=.*\d)\w{5,}")


def product_text(table: pd.DataFrame, *, plain: bool = False) -> list[str]:
    """What the encoder reads of each record: brand, title and model number.

    The brand is left out where the title has it. The model number is reduced to lower-case letters and digits, since
    one shop writes TF-TV 1022 and another tftv1022. Where the field is empty, it is taken from the title.

    Args:
        table: records with the columns title, brand and model.
        plain: join title, brand and model number as they are written. Published base scores refer to this text.
    """
    join = _plain_text if plain else _text
    return [join(*fields) for fields in zip(table["title"], table["brand"], table["model"], strict=True)]


def _plain_text(title: str, brand: str, model: str) -> str:
    return " ".join(field for field in (title, brand, model) if field)


def _text(title: str, brand: str, model: str) -> str:
    if brand.lower() in title.lower():
        brand = ""
    number = _letters_and_digits(model) or model_number(title)
    return " ".join(field for field in (brand, title, number) if field)


def record_texts(table: pd.DataFrame) -> list[str]:
    """What a cross-encoder reads of each record: its fields that are not empty, each after its name."""
    texts = []
    for values in zip(*(table[field] for field in PAIR_FIELDS), strict=True):
        fields = []
        for field, value in zip(PAIR_FIELDS, values, strict=True):
            if value:
                fields.append(f"{field}: {value[:PAIR_FIELD_CHARACTERS]}")
        texts.append(" | ".join(fields))
    return texts


def model_number(title: str) -> str:
    """The longest word of at least five characters that has both letters and digits, or ""."""
    longest = ""
    for word in title[:MAX_CHARACTERS].split():
        word = _letters_and_digits(word)
        if _MODEL_NUMBER.fullmatch(word) and len(word) > len(longest):
            longest = word
    return longest


def _letters_and_digits(written: str) -> str:
    return re.sub(r"[\W_]", "", written.lower())


def read_catalogue(path: Path | str) -> pd.DataFrame:
    """Read a catalogue csv. Columns id and title are required, the others of `COLUMNS` optional; all stay text.

    Raises:
        InputError: there is no such file, it is not UTF-8, it has no rows, a column is missing, an id is empty or
            occurs twice, or a title is empty.
    """
    table = read_table(Path(path))
    if missing := {"id", "title"} - set(table.columns):
        raise InputError(
            f"{path}: column {', '.join(sorted(missing))} is missing; found {', '.join(table.columns)}"
        )
    return check_catalogue(table, path)


def check_catalogue(table: pd.DataFrame, name: Path | str) -> pd.DataFrame:
    """The catalogue with exactly the columns of `COLUMNS`. Raises InputError as `read_catalogue` does.

    Args:
        name: what error messages call the table.
    """
    if table.empty:
        raise InputError(f"{name}: the catalogue has no rows")
    table = table.reindex(columns=list(COLUMNS), fill_value="")
    table = table.apply(lambda column: column.str.strip())
    for column in ("id", "title"):
        empty = (table[column] == "").to_numpy()
        if empty.any():
            first = int(np.flatnonzero(empty)[0]) + 1
            raise InputError(f"{name}: data row {first} has an empty {column}")
    repeated = table["id"].duplicated()
    if repeated.any():
        first = table.loc[repeated, "id"].iloc[0]
        raise InputError(f"{name}: id {first} occurs twice ({repeated.sum()} repeated ids in all)")
    return table.reset_index(drop=True)
