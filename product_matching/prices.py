"""The link back to price: what the most similar training products cost.

    python -m product_matching.prices --workspace . --model checkpoints/product_matching/model

writes predictions/matched_prices_train.csv and predictions/matched_prices_test.csv, which an ensemble joins by
sample_id. Out of fold: a training row's neighbours come only from other hold-outs (a hold-out is two folds), so
that whichever hold-out is validated, no price of its rows stands in its rows' features; a test row's neighbours
come from all training rows. The encoder has never seen a price.

Columns: sample_id, log_price (mean of the neighbours' log1p prices, weighted by similarity),
neighbour_log_price and neighbour_similarity (of the nearest), neighbour_spread (standard deviation of the
neighbours' log prices), neighbour_id, and in train fold.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write
from contracts.smape import smape
from contracts.splits import N_FOLDS, N_HOLDOUTS
from contracts.workspace import Workspace
from product_matching.config import PriceSettings
from training.settings import parse_settings

FOLDS_PER_HOLDOUT = N_FOLDS // N_HOLDOUTS


def neighbour_prices(
    queries: np.ndarray, vectors: np.ndarray, rows: pd.DataFrame, *, neighbours: int, sharpness: float
) -> pd.DataFrame:
    """Price features of B queries from N priced rows.

    Args:
        queries: (B, D), vectors: (N, D), rows of length 1.
        rows: sample_id and price of the N rows.
        sharpness: a neighbour's weight is exp(sharpness * cosine), normalised over the neighbours.
    """
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    cosine, nearest = index.search(queries, min(neighbours, len(vectors)))
    log_price = np.log1p(rows["price"].to_numpy(np.float64))[nearest]
    weight = np.exp(sharpness * (cosine - cosine[:, :1]))
    weight /= weight.sum(axis=1, keepdims=True)
    return pd.DataFrame({
        "log_price": (weight * log_price).sum(axis=1),
        "neighbour_log_price": log_price[:, 0],
        "neighbour_similarity": cosine[:, 0],
        "neighbour_spread": log_price.std(axis=1),
        "neighbour_id": rows["sample_id"].to_numpy()[nearest[:, 0]],
    })  # fmt: skip


def out_of_fold(vectors: np.ndarray, rows: pd.DataFrame, fold: np.ndarray, **options) -> pd.DataFrame:
    """`neighbour_prices` of the training rows themselves, each from the rows of other hold-outs."""
    parts = []
    for holdout in range(N_HOLDOUTS):
        inside = fold // FOLDS_PER_HOLDOUT == holdout
        if inside.any() and not inside.all():
            found = neighbour_prices(vectors[inside], vectors[~inside], rows[~inside], **options)
            parts.append(found.set_index(np.flatnonzero(inside)))
    if sum(map(len, parts)) != len(rows):
        raise InputError("all training rows lie in one hold-out; there is nothing to take neighbours from")
    return pd.concat(parts).sort_index()


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(
        PriceSettings, argv, description="Write the prices of matched training products."
    )
    workspace = Workspace(settings.workspace)
    train, test, folds = workspace.prepared("train"), workspace.prepared("test"), workspace.folds()
    if missing := set(train["sample_id"]) - set(folds.index):
        raise InputError(
            f"{workspace.path('folds')}: no fold for sample_id {sorted(missing)[0]}; run data.prepare again"
        )
    from product_matching.encoder import encode, load_encoder

    encoder = load_encoder(settings.model, max_length=settings.max_length, device=settings.device)
    # the whole text: pack size and amount stand behind the name and decide the price
    vectors = {
        split: encode(
            encoder, (table["entity_name"] + " " + table["catalog_content"]).tolist(), progress=True
        )
        for split, table in (("train", train), ("test", test))
    }
    fold = folds[train["sample_id"]].to_numpy()
    options = {"neighbours": settings.neighbours, "sharpness": settings.sharpness}
    features = {
        "train": out_of_fold(vectors["train"], train, fold, **options).assign(fold=fold),
        "test": neighbour_prices(vectors["test"], vectors["train"], train, **options),
    }
    for split, table in (("train", train), ("test", test)):
        features[split].insert(0, "sample_id", table["sample_id"].to_numpy())
        path = workspace.path("predictions", name=settings.name, split=split)
        with atomic_write(path) as file:
            features[split].to_csv(file, index=False)
        print(f"{len(table)} rows → {Path(path)}")
    price = train["price"].to_numpy()
    for column in ("log_price", "neighbour_log_price"):
        print(
            f"out-of-fold SMAPE of {column}: {smape(price, np.expm1(features['train'][column].to_numpy())):.2f}"
        )


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
