"""From the contributions of terms and columns (`word_models.attribution`) to words, fields and groups."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from contracts.catalog import FEATURE
from word_models.attribution import Attribution, Catalogue
from word_models.features import CATEGORIES, TERM_GROUPS, FeatureBuilder
from word_models.meanings import VIEWS
from word_models.terms import WORD

FIELD_OF_COLUMNS = {
    "total_amount": "total amount",
    "quantity_value": "total amount",
    "total_amount_by_kind": "total amount",
    "total_amount_bins": "total amount",
    "pack_count": "pack count",
    "pack_count_by_kind": "pack count",
    "pack_count_bins": "pack count",
    "item_size": "item size",
    "unit_kind": "unit kind",
    "text_length": "text length",
    "title_length": "title length",
}
"""The parsed field that each group of structural columns was made from."""
NUMBERS = "numbers"
"""The group of further facts that are numbers."""
LENGTHS = ("text length", "title length")
WORD_GROUPS = ("title words", "text words", "title pieces")
"""The groups that are single words, or parts of them."""
MIN_PRODUCTS = 20
"""Products that must have a word before its mean contribution is reported."""
UNITS = {"weight": " g", "volume": " ml", "count": "", "length": " m", "none": ""}


def effects(catalogue: Catalogue, product: pd.Series, attribution: Attribution, row: int) -> pd.DataFrame:
    """What moves the price of one product, the `row`-th of `attribution`.

    Columns label, group, contribution (to ln price); one row per effect. The groups are those of the terms, "meanings",
    "amounts" and "lengths". Title pieces are given to the words that they are cut from.
    """
    terms = _term_effects(catalogue, attribution, row)
    is_piece = terms["group"] == "title pieces"
    parts = [
        terms[~is_piece],
        _word_effects(catalogue, product, terms[is_piece]),
        _field_effects(catalogue, product, attribution, row),
        pd.DataFrame({"label": VIEWS, "group": "meanings", "contribution": attribution.meanings[row]}),
    ]
    # pandas warns when it concatenates an empty frame: a product may have no known word
    found = pd.concat([part for part in parts if len(part)])
    return found.groupby(["label", "group"], sort=False, as_index=False).sum()


def _term_effects(catalogue: Catalogue, attribution: Attribution, row: int) -> pd.DataFrame:
    terms = attribution.terms[row]
    names = catalogue.names
    return pd.DataFrame(
        {
            "label": names.text[terms.indices],
            "group": names.group[terms.indices],
            "contribution": terms.data,
        }
    )


def _word_effects(catalogue: Catalogue, product: pd.Series, pieces: pd.DataFrame) -> pd.DataFrame:
    """The effects of title pieces, given to words."""
    contributions = dict(zip(pieces["label"], pieces["contribution"], strict=True))
    shares = pieces_to_words(catalogue.builder, product["entity_name"], contributions)
    words = pd.DataFrame(shares, columns=["label", "contribution"])
    return words.assign(group="title pieces")


def pieces_to_words(builder: FeatureBuilder, title: str, pieces: dict[str, float]) -> list[tuple[str, float]]:
    """Give each title piece's contribution to the words that it is cut from, as (word, contribution).

    A contribution is shared among all places where the piece occurs. Where the piece is cut from several words (such as
    "all-natural"), they share it by their lengths.
    """
    owners: dict[str, Counter] = {}
    for token in title.lower().split():
        words = re.findall(WORD, token) or [token]  # a token without letters or digits stands for itself
        lengths = {word: len(word) for word in words}
        for piece in builder.pieces_of(token):
            owners.setdefault(piece, Counter()).update(lengths)
    shares = []
    for piece, contribution in pieces.items():
        for word, length in owners[piece].items():
            shares.append((word, contribution * length / owners[piece].total()))
    return shares


def _field_effects(
    catalogue: Catalogue, product: pd.Series, attribution: Attribution, row: int
) -> pd.DataFrame:
    fields = by_field(attribution, catalogue.columns)
    return pd.DataFrame(
        {
            "label": [f"{field.removeprefix(FEATURE)}: {field_value(product, field)}" for field in fields],
            "group": [group_of_field(field) for field in fields],
            "contribution": [contribution[row] for contribution in fields.values()],
        }
    )


def by_field(attribution: Attribution, columns: dict[str, slice]) -> dict[str, np.ndarray]:
    """The contribution of each parsed field, (n,) each: the sum over the columns that were made from it."""
    fields: dict[str, np.ndarray] = {}
    for name, where in columns.items():
        field = FIELD_OF_COLUMNS.get(name, name)  # a further fact is a field of its own
        contribution = attribution.structural[:, where].sum(axis=1)
        fields[field] = fields.get(field, 0) + contribution
    return fields


def group_of_field(field: str) -> str:
    """ "lengths", "amounts", or NUMBERS for a further fact."""
    if field in LENGTHS:
        return "lengths"
    return NUMBERS if field.startswith(FEATURE) else "amounts"


def field_value(product: pd.Series, field: str) -> str:
    """The value of a parsed field as a reader wants to see it."""
    if field == "text length":
        return f"{len(product['catalog_content'])} characters"
    if field == "title length":
        return f"{len(product['entity_name'])} characters"
    if field == "unit kind":
        return product["unit_kind"]
    if field.startswith(FEATURE):
        number = pd.to_numeric(product[field])
        return "not stated" if pd.isna(number) else f"{number:,.6g}"
    value = product[field.replace(" ", "_")]
    if pd.isna(value):
        return "not stated"
    if field == "pack count":
        return f"{value:g}"
    return f"{value:,.4g}{UNITS[product['unit_kind']]}"


def by_group(catalogue: Catalogue, attribution: Attribution) -> pd.DataFrame:
    """Mean size of each group's net contribution, largest first.

    Columns group, mean_abs_ln_price, percent (the same as a change of the price).
    """
    net = {}
    has_categories = bool(np.any(catalogue.names.group == CATEGORIES))
    for group in TERM_GROUPS:
        if group == CATEGORIES and not has_categories:
            continue
        net[group] = attribution.terms @ (catalogue.names.group == group).astype(float)
    net["meanings"] = attribution.meanings.sum(axis=1)
    fields = by_field(attribution, catalogue.columns)
    for field, values in fields.items():
        group = group_of_field(field)
        net[group] = net.get(group, 0) + values

    size = np.array([np.abs(values).mean() for values in net.values()])
    frame = pd.DataFrame({"group": list(net), "mean_abs_ln_price": size, "percent": percent(size)})
    return frame.sort_values("mean_abs_ln_price", ascending=False, ignore_index=True)


def by_word(all_effects: list[pd.DataFrame]) -> pd.DataFrame:
    """Mean contribution of each word to the products that have it, highest first.

    `all_effects` has one frame of `effects` per product. The result has the columns word, rows (number of products that
    have it, at least MIN_PRODUCTS), ln_price and percent.
    """
    per_product = []
    for frame in all_effects:
        # a word may count in the title, in its pieces and in the text: together they are its effect
        words = frame[frame["group"].isin(WORD_GROUPS)]
        per_product.append(words.groupby("label")["contribution"].sum())
    grouped = pd.concat(per_product).groupby(level=0)
    table = pd.DataFrame({"rows": grouped.size(), "ln_price": grouped.mean()})
    table = table[table["rows"] >= MIN_PRODUCTS].rename_axis("word").reset_index()
    table = table.assign(percent=percent(table["ln_price"]))
    return table.sort_values("ln_price", ascending=False, ignore_index=True)


def percent(ln_price: Any) -> Any:
    """A contribution to ln price as a change of the price in percent."""
    return 100 * np.expm1(ln_price)
