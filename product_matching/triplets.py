"""What training sees of labelled pairs: those without a held-out product, as triplets with hard negatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from contracts.errors import InputError
from product_matching.catalogue import product_text
from product_matching.pairs import Pairs

Encode = Callable[[list[str]], np.ndarray]
"""texts → (N, D) float32 with rows of length 1"""


def training_pairs(pairs: Pairs, held_out: str = "matches") -> pd.DataFrame:
    """The labelled pairs that training may see: split train, and neither record held out.

    Held out are, by `held_out`, the records of all validation and test matches ("matches": the products that the
    evaluation looks for) or of all validation and test pairs, non-matches included ("pairs"). Public splits deal
    out pairs, not products, so without this step a test product is seen in training as another pair's negative.
    """
    if held_out not in ("matches", "pairs"):
        raise InputError(f"--held-out {held_out}: choose matches or pairs")
    table = pairs.labelled
    elsewhere = table[(table["split"] != "train") & (table["match"] | (held_out == "pairs"))]
    train = pairs.of("train")
    # by text, not id: a text written twice is one product to the encoder
    text_of = {
        side: pd.Series([text.lower() for text in product_text(catalogue)], index=catalogue["id"])
        for side, catalogue in (("left_id", pairs.left), ("right_id", pairs.right))
    }
    hidden = {text for side, texts in text_of.items() for text in texts[elsewhere[side]]}
    seen = [texts[train[side]].isin(hidden).to_numpy() for side, texts in text_of.items()]
    return train[~(seen[0] | seen[1])]


def mine_triplets(pairs: Pairs, train: pd.DataFrame, encode: Encode, *, negatives: int = 4) -> pd.DataFrame:
    """Triplets for every match of `train`: columns anchor_id, positive_id, negative_id; anchors are left records.

    The negatives of a match are the `negatives` records most similar to the anchor under `encode` (cosine, faiss)
    that are not its match: those of the anchor's brand or category first, then the others. Candidates are the right
    records of `train`, so nothing that is held out there can come in.
    """
    import faiss

    matches = train[train["match"]]
    if matches.empty:
        raise InputError("no training match is left; there is nothing to train on")
    left = pairs.left.set_index("id", drop=False)
    candidates = pairs.right[pairs.right["id"].isin(train["right_id"])].reset_index(drop=True)
    texts = [text.lower() for text in product_text(candidates)]
    text_of = dict(zip(candidates["id"], texts, strict=True))
    brands, categories = _brands(candidates), candidates["category"].str.lower().tolist()

    anchors = left.loc[matches["left_id"].unique()]
    index = faiss.IndexFlatIP((vectors := encode(product_text(candidates))).shape[1])
    index.add(vectors)
    _, nearest = index.search(encode(product_text(anchors)), min(50 + negatives, len(candidates)))
    positives_of = matches.groupby("left_id")["right_id"].agg(list)
    triplets = []
    for anchor_id, anchor, brand, category, rows in zip(
        anchors["id"],
        product_text(anchors),
        _brands(anchors),
        anchors["category"].str.lower(),
        nearest,
        strict=True,
    ):
        # by text: the words of the anchor or of a match under another id are no negative
        same = {text_of[positive] for positive in positives_of[anchor_id]} | {anchor.lower()}
        others = [row for row in rows if texts[row] not in same]
        related = [
            bool(brand and brands[row] == brand or category and categories[row] == category) for row in others
        ]
        chosen = [others[place] for place in np.argsort(np.logical_not(related), kind="stable")[:negatives]]
        triplets += [
            (anchor_id, positive, candidates.at[row, "id"])
            for positive in positives_of[anchor_id]
            for row in chosen
        ]
    return pd.DataFrame(triplets, columns=["anchor_id", "positive_id", "negative_id"])


def _brands(table: pd.DataFrame) -> list[str]:
    """Brand of each record; a catalogue without brands usually puts it first in the title."""
    first_word = table["title"].str.lower().str.split().str[0]
    return table["brand"].str.lower().where(table["brand"] != "", first_word).tolist()
