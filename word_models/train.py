"""Out-of-fold and test prices of a model on word counts.

    python -m word_models.train --workspace OUT --model mlp

Each of the five hold-outs is predicted by a model that was fitted on the other four, so every training row gets a
price from a model that has not seen it; test rows are priced by a model fitted on all rows. Nothing is tuned on the
held-out rows: the number of epochs and of trees is fixed.
"""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from contracts.errors import run_entry_point
from contracts.files import atomic_write
from contracts.smape import smape_with_error
from contracts.splits import N_HOLDOUTS, roles
from contracts.workspace import SPLITS, Workspace
from training.settings import parse_settings
from word_models.config import WordModelSettings


def main(argv: list[str] | None = None) -> dict[str, float]:
    settings = parse_settings(WordModelSettings, argv, description=__doc__.split("\n")[0])
    from word_models.features import add_embeddings, build_features
    from word_models.models import MODELS

    workspace, model = Workspace(settings.workspace), MODELS[settings.model]
    train, test = workspace.prepared("train"), workspace.prepared("test")
    fold = workspace.folds().reindex(train["sample_id"]).to_numpy()
    price = train["price"].to_numpy()
    ln_price = np.log(price)
    features = dict(zip(SPLITS, build_features(train, test), strict=True))
    features, test_features = add_embeddings(features, workspace, settings.embeddings).values()

    predicted = np.empty(len(train))
    for holdout in tqdm(range(N_HOLDOUTS), desc=f"{settings.model}, out of fold", unit=" hold-outs"):
        asked = np.isin(fold, roles(holdout).validate)
        predicted[asked] = model(settings, features[~asked], ln_price[~asked], features[asked])
    test_predicted = model(settings, features, ln_price, test_features)

    name = settings.name or "_".join(["words", settings.model, *settings.embeddings])
    tables = {
        "train": train[["sample_id"]].assign(log_price=np.log1p(np.exp(predicted)), fold=fold),
        "test": test[["sample_id"]].assign(log_price=np.log1p(np.exp(test_predicted))),
    }
    for split, table in tables.items():
        with atomic_write(workspace.path("predictions", name=name, split=split)) as file:
            table.to_csv(file, index=False)
    score, error = smape_with_error(price, np.exp(predicted))
    print(f"{name}: out-of-fold SMAPE {score:.2f} ± {error:.2f} on {len(train)} rows")
    return {"smape": score, "standard_error": error}


if __name__ == "__main__":
    run_entry_point(main)
