"""What moves the price of one product: members, words and fields, and the nearest products with known prices.

print(model.explain({"sample_id": "1", "catalog_content": "Organic green tea, 20 bags"}))
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contracts.catalog import FEATURE, read_table
from contracts.embeddings import align, read_embeddings
from contracts.workspace import Workspace
from pricing.products import Products, one_product

if TYPE_CHECKING:
    from pricing.model import Priced, PriceModel

NEAREST = 5
WORD = re.compile(r"\w+(?:[.'’-]\w+)*")
MOST_WORDS = 40
"""Words of a name that are tried, from its start. Each costs a price."""
LISTED_EFFECTS = 12
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
    """label, kind ("word" or "field"), factor: the price divided by the price without it; largest effect first"""
    currency: str

    def __str__(self) -> str:
        parts = [
            f"price {self.currency} {self.price['price']:.2f}, "
            f"80 % interval {self.price['low_80']:.2f} to {self.price['high_80']:.2f}",
            "what each member says\n" + self.members.to_string(index=False, float_format="%.2f"),
        ]
        if len(self.effects):
            listed = self.effects.head(LISTED_EFFECTS).to_string(index=False, float_format="× %.2f")
            parts.append(f"what a word or field does to the price\n{listed}")
        if len(self.known_products):
            shown = self.known_products.assign(name=self.known_products["name"].str.slice(0, 60))
            listed = shown.to_string(index=False, float_format="%.2f")
            parts.append(f"nearest known products, by {self.compared_by}\n{listed}")
        if self.price["missing"]:
            parts.append(f"missing: {self.price['missing']}")
        return "\n\n".join(parts)


def explain(model: PriceModel, product: Products, *, images: Path | str | None = None) -> Explanation:
    """Explain the price of one product."""
    priced = model.price(product, images=images)
    members = pd.DataFrame(
        {
            "member": [member.name for member in model.ensemble.members],
            "weight": model.ensemble.weights,
            "price": np.exp(priced.ln_by_member[0]),
        }
    )
    known = model.known_products
    return Explanation(
        price=priced.prices.iloc[0],
        members=members,
        known_products=known.nearest(priced) if known else pd.DataFrame(columns=KnownProducts.COLUMNS),
        compared_by=known.compared_by if known else "nothing",
        effects=effects(model, priced, images=images),
        currency=model.mapping.currency,
    )


def effects(model: PriceModel, priced: Priced, *, images: Path | str | None = None) -> pd.DataFrame:
    """What each word of the name and each field does to the price, by pricing the product without it.

    This erasure (Li et al. 2016, "Understanding neural networks through representation erasure") asks the whole system,
    encoders included. The factors of several words do not multiply to that of all of them.

    Returns:
        label, kind and factor, see `Explanation`.
    """
    row = priced.products.rows.iloc[0]
    blank = one_product("", model.mapping).rows.iloc[0]
    without: dict[tuple[str, str], pd.Series] = {}
    for word in dict.fromkeys(WORD.findall(row["entity_name"])):
        if len(without) < MOST_WORDS:
            without[word, "word"] = _without_word(row, word)
    fields: dict[str, tuple[str, ...]] = {}
    if pd.notna(row["total_amount"]):
        fields["amount"] = AMOUNT_COLUMNS
    if model.reads_pictures and "picture" not in priced.prices["missing"].iloc[0]:
        fields["picture"] = ("image",)
    for name in model.mapping.features:
        fields[name] = (FEATURE + name,)
    for name, columns in fields.items():
        changed = row.copy()
        changed[list(columns)] = blank[list(columns)]
        without[name, "field"] = changed

    if not without:
        return pd.DataFrame(columns=["label", "kind", "factor"])
    rows = pd.DataFrame(list(without.values())).astype(priced.products.rows.dtypes).reset_index(drop=True)
    rows["sample_id"] = rows.index.astype(str)
    prices = model.price(Products(rows["sample_id"].to_numpy(), rows), images=images).prices["price"]
    found = pd.DataFrame(list(without), columns=["label", "kind"])
    found["factor"] = priced.prices["price"].iloc[0] / prices.to_numpy()
    by_size = found["factor"].map(np.log).abs().sort_values(ascending=False).index
    return found.loc[by_size].reset_index(drop=True)


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

    @classmethod
    def open(cls, model: PriceModel) -> KnownProducts | None:
        """None where the system keeps no known products (`pricing.export --no-known-products`)."""
        return cls(model) if model.workspace.path("prepared", split="train").is_file() else None

    def nearest(self, priced: Priced, count: int = NEAREST) -> pd.DataFrame:
        """The `count` known products that resemble the first priced one most: COLUMNS, most similar first.

        No rows if nothing is known of the product.
        """
        if self.embedding is None:
            asked = self.words.transform(priced.products.rows["entity_name"].iloc[:1])  # (1, D_in)
            similarity = (self.known @ asked.T).toarray()[:, 0]  # (N,)
        elif priced.embeddings[self.embedding].valid[0]:
            content = priced.embeddings[self.embedding].embeddings[:1].astype(np.float32)
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
