"""What moves the price of one product: members, words and fields, and the nearest products with known prices.

print(model.explain({"sample_id": "1", "catalog_content": "Organic green tea, 20 bags"}))
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contracts.catalog import FEATURE, read_table
from contracts.embeddings import Embeddings, align, read_embeddings
from contracts.workspace import Workspace
from data.quantity import parse_quantity
from pricing.parts import WordPricer
from pricing.products import Products

if TYPE_CHECKING:
    from pricing.model import Priced, PriceModel

NEAREST = 5
WORD = re.compile(r"\w+(?:[.'’-]\w+)*")
MOST_WORDS = 40
"""Words of a name that are tried, from its start. Each costs a price."""
LISTED_EFFECTS = 12
COMPARED_PRODUCTS = 500
"""Known products of which the similarity to the others is found, to know what is ordinary."""
AMOUNT_COLUMNS = (
    "amount", "unit", "unit_kind", "pack_count", "item_size", "total_amount", "quantity_value", "unit_volume",
    "unit_weight",
)  # fmt: skip
"""What is parsed from a text that states an amount."""


@dataclass
class Explanation:
    """Why one product has its price."""

    price: pd.Series
    """price, its intervals, and what was missing, as `PriceModel.predict` gives them"""
    members: pd.DataFrame
    """member, weight, price: the ensemble's price is their weighted geometric mean"""
    known_products: pd.DataFrame
    """sample_id, name, price, similarity (cosine, at most 1) of the nearest known products; empty if none are kept"""
    compared_by: str
    """what the similarity compares"""
    effects: pd.DataFrame
    """label, kind ("word", "field" or, where the system reads several embeddings, "modality"), factor: the price
    divided by the price without it; largest effect first"""
    currency: str

    def __str__(self) -> str:
        parts = [
            f"price {self.currency} {self.price['price']:.2f}, "
            f"80 % interval {self.price['low_80']:.2f} to {self.price['high_80']:.2f}",
            "what each member says\n" + self.members.to_string(index=False, float_format="%.2f"),
        ]
        if len(self.effects):
            listed = self.effects.head(LISTED_EFFECTS).to_string(index=False, float_format="× %.2f")
            parts.append(f"what a word, field or embedding does to the price\n{listed}")
        if len(self.known_products):
            shown = self.known_products.assign(name=self.known_products["name"].str.slice(0, 60))
            listed = shown.to_string(index=False, float_format="%.2f")
            parts.append(f"nearest known products, by {self.compared_by}\n{listed}")
        if self.price["missing"]:
            parts.append(f"missing: {self.price['missing']}")
        return "\n\n".join(parts)


def explain(model: PriceModel, product: Products, *, images: Path | str | None = None) -> Explanation:
    """Explain the price of one product."""
    return explain_each(model, product, images=images)[0]


def explain_each(
    model: PriceModel,
    products: Products,
    *,
    images: Path | str | None = None,
    most_words: int = MOST_WORDS,
    encode_again: bool = True,
    with_effects: Sequence[bool] | None = None,
) -> list[Explanation]:
    """Price N products and explain their prices.

    What a word or field does to a price is found by pricing the product without it. This erasure (Li et al. 2016,
    "Understanding neural networks through representation erasure") asks the whole system, encoders included. The
    factors of several words do not multiply to that of all of them. Each member prices the products and all their
    erased forms in one call.

    Args:
        most_words: words per name that are erased, from its start.
        encode_again: False keeps the embedding of the whole text for its erased forms, which saves most of the time.
            The factors are then what members make of the words and fields that they read themselves. Systems without a
            member that reads words are always encoded again.
        with_effects: (N,) which products are explained by erasure; by default all.
    """
    embeddings = model.encode(products, images=images)
    erased: list[_Erased] = []
    for product in range(len(products)):
        if with_effects is None or with_effects[product]:
            erased += _erasures(model, products, embeddings, product, most_words)
    if erased:
        forms = _forms(products, erased)
        if encode_again or not any(isinstance(member, WordPricer) for member in model.members):
            of_forms = model.encode(forms, images=images)
        else:
            of_forms = _kept_embeddings(embeddings, erased, forms)
        _mask(model, of_forms, erased)
        everything = Products(
            np.concatenate([products.ids, forms.ids]),
            pd.concat([products.rows, forms.rows], ignore_index=True),
        )
        priced = model.price_encoded(everything, _concatenated(embeddings, of_forms))
    else:
        priced = model.price_encoded(products, embeddings)

    prices = priced.prices["price"].to_numpy()
    of_product = np.array([item.product for item in erased], int)
    factors = prices[of_product] / prices[len(products) :]
    known = model.known_products
    explanations = []
    for row in range(len(products)):
        members = pd.DataFrame(
            {
                "member": [member.name for member in model.ensemble.members],
                "weight": model.ensemble.weights,
                "price": np.exp(priced.ln_by_member[row]),
            }
        )
        own = np.flatnonzero(of_product == row)
        explanations.append(
            Explanation(
                price=priced.prices.iloc[row],
                members=members,
                known_products=known.nearest(priced, row)
                if known
                else pd.DataFrame(columns=KnownProducts.COLUMNS),
                compared_by=known.compared_by if known else "nothing",
                effects=_as_effects([erased[number] for number in own], factors[own]),
                currency=model.mapping.currency,
            )
        )
    return explanations


@dataclass
class _Erased:
    """A product without one word, field or modality."""

    product: int
    """row of the product"""
    label: str
    kind: str
    row: pd.Series


def _erasures(
    model: PriceModel, products: Products, embeddings: dict[str, Embeddings], product: int, most_words: int
) -> list[_Erased]:
    """The product without each of its first words, and without each of its fields."""
    row = products.rows.iloc[product]
    words = list(dict.fromkeys(WORD.findall(row["entity_name"])))[:most_words]
    erased = [_Erased(product, word, "word", _without_word(row, word)) for word in words]
    fields: dict[str, tuple[str, ...]] = {}
    if pd.notna(row["total_amount"]):
        fields["amount"] = AMOUNT_COLUMNS
    has_picture = [
        embedding.valid[product]
        for name, embedding in embeddings.items()
        if model.encoders[name].reads_pictures
    ]
    if any(has_picture):
        fields["picture"] = ("image",)
    for name in model.mapping.features:
        fields[name] = (FEATURE + name,)
    for name, columns in fields.items():
        changed = row.copy()
        for column in columns:
            is_number = pd.api.types.is_numeric_dtype(products.rows[column])
            changed[column] = _blank(column, is_number=is_number)
        erased.append(_Erased(product, name, "field", changed))
    if len(embeddings) > 1:
        for name, embedding in embeddings.items():
            if embedding.valid[product]:
                erased.append(_Erased(product, name, "modality", row))
    return erased


def _blank(column: str, *, is_number: bool) -> float | str:
    """What stands in a column of a product without this field."""
    stated = None
    if column in AMOUNT_COLUMNS:
        # some columns of an amount are 0 where there is none
        stated = getattr(parse_quantity(""), column.replace("unit_kind", "kind"))
    if stated is not None:
        return stated
    return np.nan if is_number else ""


def _forms(products: Products, erased: list[_Erased]) -> Products:
    """The erased forms as products, numbered behind the whole ones."""
    rows = pd.DataFrame([item.row for item in erased]).astype(products.rows.dtypes).reset_index(drop=True)
    numbers = np.arange(len(products), len(products) + len(rows)).astype(str)
    rows["sample_id"] = numbers
    return Products(numbers, rows)


def _kept_embeddings(
    embeddings: dict[str, Embeddings], erased: list[_Erased], forms: Products
) -> dict[str, Embeddings]:
    """Those of the whole products."""
    of_product = [item.product for item in erased]
    ids = forms.rows["sample_id"].to_numpy()
    kept = {}
    for name, whole in embeddings.items():
        kept[name] = Embeddings(ids, whole.embeddings[of_product], whole.valid[of_product], whole.meta)
    return kept


def _mask(model: PriceModel, embeddings: dict[str, Embeddings], erased: list[_Erased]) -> None:
    """Take the erased modalities away, and with the picture whatever was seen in it."""
    for embedding in embeddings.values():
        # what an encoder returns may be memory that only it may write to
        embedding.embeddings = embedding.embeddings.copy()
        embedding.valid = embedding.valid.copy()
    for number, item in enumerate(erased):
        for name, embedding in embeddings.items():
            is_of_picture = (
                item.label == "picture" and item.kind == "field" and model.encoders[name].reads_pictures
            )
            if is_of_picture or (item.label == name and item.kind == "modality"):
                embedding.embeddings[number] = 0
                embedding.valid[number] = False


def _concatenated(first: dict[str, Embeddings], second: dict[str, Embeddings]) -> dict[str, Embeddings]:
    """The rows of both, by name."""
    both = {}
    for name, top in first.items():
        bottom = second[name]
        both[name] = Embeddings(
            np.concatenate([top.sample_ids, bottom.sample_ids]),
            np.concatenate([top.embeddings, bottom.embeddings]),
            np.concatenate([top.valid, bottom.valid]),
            top.meta,
        )
    return both


def _as_effects(erased: list[_Erased], factors: np.ndarray) -> pd.DataFrame:
    """label, kind and factor, the largest effect first."""
    found = pd.DataFrame({"label": [item.label for item in erased], "kind": [item.kind for item in erased]})
    found["factor"] = factors
    by_size = np.argsort(-np.abs(np.log(factors)), kind="stable")
    return found.iloc[by_size].reset_index(drop=True)


def _without_word(row: pd.Series, word: str) -> pd.Series:
    """The product without this word in name and text; what was parsed from them stays."""
    changed = row.copy()
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    for column in ("entity_name", "catalog_content"):
        changed[column] = re.sub(pattern, "", row[column])
    changed["text"] = f"{changed['entity_name']} [SEP] {changed['catalog_content']}"
    return changed


class KnownProducts:
    """The training products, to be searched for those that resemble a new one.

    They are compared by the first text embedding that the system reads, or by the words of their names if it reads
    none.

    Legend: N known products, D_in width of the embedding or number of words.
    """

    COLUMNS = ("sample_id", "name", "price", "similarity")

    def __init__(self, model: PriceModel):
        workspace = model.workspace
        table = read_table(workspace.path("prepared", split="train"))
        self.products = pd.DataFrame(
            {
                "sample_id": table["sample_id"],
                "name": table["entity_name"],
                "price": table["price"].astype(float),
            }
        )
        self.embedding = searched_embedding(model)
        if self.embedding is None:
            from sklearn.feature_extraction.text import TfidfVectorizer

            self.words = TfidfVectorizer(sublinear_tf=True).fit(self.products["name"])
            self.known = self.words.transform(self.products["name"])
            self.compared_by = "the words of their names"
            return
        self.named_columns = model.encoders[self.embedding].named_columns
        path = workspace.path("embeddings", name=self.embedding, split="train")
        aligned = align(read_embeddings(path), table["sample_id"].to_numpy(), path)
        content = self._without_named(aligned.embeddings)
        # encoders add a common direction to all embeddings; without it, cosines tell products apart
        self.mean = content[aligned.valid].mean(axis=0)
        self.known = self._unit_length(content) * aligned.valid[:, None]
        self.compared_by = f"the embedding {self.embedding}"

    @cached_property
    def ordinary_similarity(self) -> float:
        """Below it, a product resembles none of the known ones much.

        99 of 100 known products reach it with the one that resembles them most; a sample of them is asked. In a
        catalogue of near copies half of the scale suffices.
        """
        chosen = np.random.default_rng(0).permutation(len(self.products))[:COMPARED_PRODUCTS]
        similarity = self.known[chosen] @ self.known.T  # (n, N)
        if self.embedding is None:
            similarity = similarity.toarray()
        similarity[np.arange(len(chosen)), chosen] = -1  # not with itself
        return min(float(np.quantile(similarity.max(axis=1), 0.01)), 0.5)

    @classmethod
    def open(cls, model: PriceModel) -> KnownProducts | None:
        """None where the system keeps no known products (`pricing.export --no-known-products`)."""
        return cls(model) if model.workspace.path("prepared", split="train").is_file() else None

    def nearest(self, priced: Priced, row: int = 0, count: int = NEAREST) -> pd.DataFrame:
        """The `count` known products that resemble a priced one, by its row, most: COLUMNS, most similar first.

        No rows if nothing is known of the product.
        """
        if self.embedding is None:
            asked = self.words.transform(priced.products.rows["entity_name"].iloc[[row]])  # (1, D_in)
            similarity = (self.known @ asked.T).toarray()[:, 0]  # (N,)
        elif priced.embeddings[self.embedding].valid[row]:
            content = priced.embeddings[self.embedding].embeddings[[row]].astype(np.float32)
            similarity = self.known @ self._unit_length(self._without_named(content))[0]  # (N,)
        else:
            similarity = np.zeros(len(self.products))
        found = np.argsort(-similarity, kind="stable")[:count]
        found = found[similarity[found] > 0]
        return self.products.iloc[found].assign(similarity=similarity[found]).reset_index(drop=True)

    def _without_named(self, embeddings: np.ndarray) -> np.ndarray:
        return embeddings[:, : embeddings.shape[1] - self.named_columns]

    def _unit_length(self, embeddings: np.ndarray) -> np.ndarray:
        centred = embeddings - self.mean
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        length[length == 0] = 1  # such a row is similar to none
        return centred / length


def searched_embedding(model: PriceModel) -> str | None:
    """Name of the embedding by which known products are compared; None where words have to do."""
    for name, source in model.encoders.items():
        path = Workspace(model.root).path("embeddings", name=name, split="train")
        if not source.reads_pictures and path.is_file():
            return name
    return None
