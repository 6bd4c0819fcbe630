"""The link back to price: predict a product's price from what the most similar training products cost.

    python -m product_matching.prices --workspace . --model checkpoints/product_matching/model

Writes predictions/matched_prices_train.csv and predictions/matched_prices_test.csv, which the ensemble reads. A price
is the mean of the neighbours' log1p prices, weighted by similarity. Beside them, matched_prices_<split>.neighbours.csv
says where the prices come from: neighbour_id, neighbour_log_price and neighbour_similarity of the nearest product, and
neighbour_spread, the standard deviation of the neighbours' log1p prices.

The train file is out of fold: the neighbours of a row come only from other hold-outs (two folds each), so a row never
helps to price the rows that it is validated with. Test rows have all training rows as neighbours. The encoder has
never seen a price.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write
from contracts.predictions import write_predictions
from contracts.smape import smape
from contracts.splits import N_FOLDS, N_HOLDOUTS, fitted_on, fitted_out_of_fold
from contracts.workspace import Workspace
from product_matching.config import PriceSettings
from training.settings import parse_settings

FOLDS_PER_HOLDOUT = N_FOLDS // N_HOLDOUTS


def neighbour_prices(
    queries: np.ndarray, vectors: np.ndarray, rows: pd.DataFrame, *, neighbours: int, sharpness: float
) -> pd.DataFrame:
    """Prices of B query rows from the N priced `rows`, one line per query.

    Args:
        queries: (B, D) float32, rows of length 1.
        vectors: (N, D) float32, rows of length 1.
        rows: sample_id and price (dollars) of the N rows.
        neighbours: rows averaged per query.
        sharpness: a neighbour weighs exp(sharpness · cosine), normalised over the neighbours.

    Returns:
        log_price (log1p of dollars), neighbour_log_price, neighbour_similarity, neighbour_spread, neighbour_id.
    """
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    cosine, nearest = index.search(queries, min(neighbours, len(vectors)))  # (B, neighbours) each
    log_price = np.log1p(rows["price"].to_numpy(np.float64))[nearest]  # (B, neighbours)
    # a softmax over the neighbours; relative to the nearest one, so that exp cannot overflow
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
    """`neighbour_prices` of the training rows themselves, each from the rows of the other hold-outs.

    Raises InputError when all rows lie in one hold-out.
    """
    parts = []
    for holdout in range(N_HOLDOUTS):
        inside = fold // FOLDS_PER_HOLDOUT == holdout
        if inside.all():
            raise InputError(
                "all training rows lie in one hold-out; there is nothing to take neighbours from"
            )
        if inside.any():
            found = neighbour_prices(vectors[inside], vectors[~inside], rows[~inside], **options)
            parts.append(found.set_index(np.flatnonzero(inside)))  # row numbers, to restore the order
    return pd.concat(parts).sort_index()


def write_prices(
    workspace: Workspace, settings: PriceSettings, split: str, rows: pd.DataFrame, prices: pd.DataFrame
) -> None:
    """Write the prediction file of one split, and beside it the file of nearest neighbours.

    Args:
        rows: sample_id of each row, and its fold in train.
        prices: what `neighbour_prices` returned for these rows, in the same order.
    """
    # a training row is priced by the folds outside its hold-out, a test row by all of them
    in_train = split == "train"
    all_folds = tuple(range(N_FOLDS))
    path = write_predictions(
        workspace,
        settings.name,
        split,
        rows["sample_id"].to_numpy(),
        prices["log_price"].to_numpy(),
        fold=rows["fold"].to_numpy() if in_train else None,
        meta={
            "stage": "product_matching.prices",
            "model": settings.model,
            "fitted_on": fitted_out_of_fold(N_HOLDOUTS) if in_train else fitted_on(encoder_folds=all_folds),
        },
    )
    neighbours = prices.drop(columns="log_price")
    neighbours.insert(0, "sample_id", rows["sample_id"].to_numpy())
    with atomic_write(path.with_suffix(".neighbours.csv")) as file:
        neighbours.to_csv(file, index=False)
    print(f"{len(rows)} rows → {path}")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(
        PriceSettings, argv, description="Write the prices of matched training products."
    )
    workspace = Workspace(settings.workspace)
    train = workspace.training_table()
    test = workspace.prepared("test")
    from product_matching.encoder import encode, load_encoder

    encoder = load_encoder(settings.model, max_length=settings.max_length, device=settings.device)
    # the whole text: pack size and amount come after the name, and they decide the price
    train_texts = (train["entity_name"] + " " + train["catalog_content"]).tolist()
    test_texts = (test["entity_name"] + " " + test["catalog_content"]).tolist()
    train_vectors = encode(encoder, train_texts, progress=True)
    test_vectors = encode(encoder, test_texts, progress=True)

    options = {"neighbours": settings.neighbours, "sharpness": settings.sharpness}
    train_prices = out_of_fold(train_vectors, train, train["fold"].to_numpy(), **options)
    test_prices = neighbour_prices(test_vectors, train_vectors, train, **options)
    write_prices(workspace, settings, "train", train, train_prices)
    write_prices(workspace, settings, "test", test, test_prices)
    for column in ("log_price", "neighbour_log_price"):
        predicted = np.expm1(train_prices[column].to_numpy())
        print(f"out-of-fold SMAPE of {column}: {smape(train['price'].to_numpy(), predicted):.2f}")


if __name__ == "__main__":
    run_entry_point(main)
