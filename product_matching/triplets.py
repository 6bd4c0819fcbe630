"""What training sees of labelled pairs: those without a held-out product, as triplets with hard negatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contracts.errors import InputError
from product_matching.catalogue import product_text
from product_matching.pairs import Pairs

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

Encode = Callable[[list[str]], np.ndarray]
"""texts → (N, D) float32 with rows of length 1"""

NEAREST_RECORDS = 50
"""Records looked at per anchor beside the wanted number: enough to find some of the anchor's brand or category."""


def training_pairs(pairs: Pairs, held_out: str = "matches") -> pd.DataFrame:
    """The labelled pairs that training may see: the pairs of split train without a held-out record.

    Public splits deal out pairs, not products. Without this step a test product would be seen in training, as the
    negative of another pair.

    Args:
        held_out: "matches" holds out the records of all validation and test matches, the products that the
            evaluation looks for. "pairs" holds out the records of all validation and test pairs.
    """
    if held_out not in ("matches", "pairs"):
        raise InputError(f"--held-out {held_out}: choose matches or pairs")
    evaluated = pairs.labelled[pairs.labelled["split"] != "train"]
    if held_out == "matches":
        evaluated = evaluated[evaluated["match"]]
    train = pairs.of("train")

    # Records are compared by their words, not by id: to the encoder, a text under two ids is one product.
    left_words = _words_by_id(pairs.left)
    right_words = _words_by_id(pairs.right)
    hidden = {*left_words[evaluated["left_id"]], *right_words[evaluated["right_id"]]}
    left_hidden = left_words[train["left_id"]].isin(hidden).to_numpy()
    right_hidden = right_words[train["right_id"]].isin(hidden).to_numpy()
    return train[~(left_hidden | right_hidden)]


def _words_by_id(catalogue: pd.DataFrame) -> pd.Series:
    return pd.Series(product_text(catalogue), index=catalogue["id"]).str.lower()


@dataclass(frozen=True)
class _Listing:
    """What mining compares of a record, in lower case."""

    id: str
    words: str
    brand: str
    category: str


def mine_triplets(pairs: Pairs, train: pd.DataFrame, encode: Encode, *, negatives: int) -> pd.DataFrame:
    """Triplets for every match of `train`.

    The hard negatives of a match are the records most similar to its anchor (by cosine) that are another product:
    first those of the anchor's brand or category, then the others. They come from the right records of `train`, so
    none of them is held out.

    Args:
        pairs: supplies the records of `train`.
        train: labelled pairs, from `training_pairs`.
        encode: the encoder whose cosine says what is similar.
        negatives: hard negatives per match.

    Returns:
        Columns anchor_id (left record), positive_id and negative_id (right records); one row per triplet.
    """
    matches = train[train["match"]]
    if matches.empty:
        raise InputError("no training match is left; there is nothing to train on")
    # one row per anchor, though it may have several matches
    anchor_table = pairs.left.set_index("id", drop=False).loc[matches["left_id"].unique()]
    candidate_table = pairs.right[pairs.right["id"].isin(train["right_id"])]
    anchors = _listings(anchor_table)
    candidates = _listings(candidate_table)
    words_of = {candidate.id: candidate.words for candidate in candidates}
    positives_of = matches.groupby("left_id")["right_id"].agg(list)
    nearest = _nearest(
        encode, product_text(anchor_table), product_text(candidate_table), NEAREST_RECORDS + negatives
    )

    triplets = []
    for anchor, rows in zip(anchors, nearest, strict=True):
        positives = positives_of[anchor.id]
        # again by words: a copy of a match, or of the anchor itself, is no negative
        same_product = {anchor.words, *(words_of[positive] for positive in positives)}
        others = [candidates[row] for row in rows if candidates[row].words not in same_product]
        # both lists keep the order of similarity
        related = [other for other in others if _related(anchor, other)]
        unrelated = [other for other in others if not _related(anchor, other)]
        hardest = (related + unrelated)[:negatives]
        for positive in positives:
            for negative in hardest:
                triplets.append((anchor.id, positive, negative.id))
    return pd.DataFrame(triplets, columns=["anchor_id", "positive_id", "negative_id"])


def _listings(table: pd.DataFrame) -> list[_Listing]:
    # a catalogue without brands usually puts the brand first in the title
    first_word = table["title"].str.split().str[0]
    brand = table["brand"].where(table["brand"] != "", first_word)
    words = [text.lower() for text in product_text(table)]
    fields = zip(table["id"], words, brand.str.lower(), table["category"].str.lower(), strict=True)
    return [_Listing(*values) for values in fields]


def _related(anchor: _Listing, other: _Listing) -> bool:
    same_brand = anchor.brand != "" and anchor.brand == other.brand
    same_category = anchor.category != "" and anchor.category == other.category
    return same_brand or same_category


def _nearest(encode: Encode, anchors: list[str], candidates: list[str], count: int) -> np.ndarray:
    """Rows of the `count` candidates (fewer if there are fewer) most similar to each anchor, (anchors, count) int."""
    import faiss

    vectors = encode(candidates)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index.search(encode(anchors), min(count, len(candidates)))[1]


class TripletTexts:
    """The texts of triplets, in the form that the batch sampler of sentence-transformers reads."""

    column_names = ("anchor", "positive", "negative")

    def __init__(self, triplets: pd.DataFrame, pairs: Pairs):
        left = dict(zip(pairs.left["id"], product_text(pairs.left), strict=True))
        right = dict(zip(pairs.right["id"], product_text(pairs.right), strict=True))
        self.columns = {
            "anchor": triplets["anchor_id"].map(left).tolist(),
            "positive": triplets["positive_id"].map(right).tolist(),
            "negative": triplets["negative_id"].map(right).tolist(),
        }

    def __len__(self) -> int:
        return len(self.columns["anchor"])

    def __getitem__(self, row: int) -> dict[str, str]:
        return {name: texts[row] for name, texts in self.columns.items()}

    def features(self, rows: list[int], encoder: SentenceTransformer) -> list[dict[str, torch.Tensor]]:
        """Model inputs on the encoder's device: one dict each for the anchors, positives and negatives of `rows`."""
        inputs = []
        for texts in self.columns.values():
            column = encoder.preprocess([texts[row] for row in rows])
            for key, value in column.items():
                if hasattr(value, "to"):  # the library also puts plain values there
                    column[key] = value.to(encoder.device)
            inputs.append(column)
        return inputs
