"""Out-of-fold and test prices of a model on word counts.

    python -m word_models.train --workspace OUT --model mlp

Each of the five hold-outs is predicted by a model that was fitted on the other four, so every training row gets a
price from a model that has not seen it. Test rows are priced by a model that was fitted on all rows. Nothing is tuned
on the held-out rows: the numbers of epochs and of trees are fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from contracts.errors import run_entry_point
from contracts.predictions import write_predictions
from contracts.smape import smape_with_error
from contracts.splits import N_FOLDS, N_HOLDOUTS, fitted_on, fitted_out_of_fold, roles, union_fitted_on
from contracts.workspace import Workspace
from training.settings import parse_settings
from word_models.config import WordModelSettings

if TYPE_CHECKING:
    from word_models.features import Features


def main(argv: list[str] | None = None) -> dict[str, float]:
    settings = parse_settings(WordModelSettings, argv, description=__doc__.split("\n")[0])
    from word_models.embedding_columns import add_embeddings, read_embedding_files
    from word_models.features import build_features
    from word_models.models import MODELS

    workspace = Workspace(settings.workspace)
    tables = {"train": workspace.training_table(), "test": workspace.prepared("test")}
    features = build_features(**tables)
    # an encoder that has seen a row counts like a model that has seen it
    encoders_fitted_on = []
    for name in settings.embeddings:
        files = read_embedding_files(workspace, name)
        features = add_embeddings(features, tables, name, files)
        encoders_fitted_on.append(files["train"].meta["fitted_on"])

    price = tables["train"]["price"].to_numpy()
    fold = tables["train"]["fold"].to_numpy()
    predicted = predict_out_of_fold(settings, features["train"], np.log(price), fold)
    fit_predict = MODELS[settings.model]
    test_predicted = fit_predict(settings, features["train"], np.log(price), features["test"])

    name = settings.prediction_name
    meta = {"stage": "word_models.train", "model": settings.model}
    write_predictions(
        workspace,
        name,
        "train",
        tables["train"]["sample_id"].to_numpy(),
        log_price(predicted),
        meta=meta | {"fitted_on": union_fitted_on(fitted_out_of_fold(N_HOLDOUTS), *encoders_fitted_on)},
        fold=fold,
    )
    write_predictions(
        workspace,
        name,
        "test",
        tables["test"]["sample_id"].to_numpy(),
        log_price(test_predicted),
        meta=meta | {"fitted_on": fitted_on(encoder_folds=tuple(range(N_FOLDS)))},
    )
    score, error = smape_with_error(price, np.exp(predicted))
    print(f"{name}: out-of-fold SMAPE {score:.2f} ± {error:.2f} on {len(price)} rows")
    return {"smape": score, "standard_error": error}


def predict_out_of_fold(
    settings: WordModelSettings, features: Features, ln_price: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """ln price (N,) of each row by a model fitted on the rows outside the row's hold-out.

    ln_price and fold are (N,).
    """
    from word_models.models import MODELS

    fit_predict = MODELS[settings.model]
    predicted = np.full(len(fold), np.nan)  # every row is overwritten; NaN would show one that is not
    for holdout in tqdm(range(N_HOLDOUTS), desc=f"{settings.model}, out of fold", unit=" hold-outs"):
        asked = np.isin(fold, roles(holdout).validate)
        predicted[asked] = fit_predict(settings, features[~asked], ln_price[~asked], features[asked])
    return predicted


def log_price(ln_price: np.ndarray) -> np.ndarray:
    """ln of dollars → log1p of dollars, the unit of prediction files."""
    return np.log1p(np.exp(ln_price))


if __name__ == "__main__":
    run_entry_point(main)
