"""Fit a model on words, score it out of fold, save it, and price the test table.

    python -m word_models.train --workspace OUT --model mlp

Each of the five hold-outs is predicted by a model that was fitted on the other four, so every training row gets a
price from a model that has not seen it, and the score is honest. The model that is saved under checkpoints/ is fitted
on all rows; it prices the test table, if there is one, and any other table by word_models.predict. Nothing is tuned on
the held-out rows: the numbers of updates and of trees are fixed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm import tqdm

from contracts.errors import InputError, run_entry_point
from contracts.files import read_json
from contracts.predictions import remove_predictions, write_predictions
from contracts.smape import best_constant, smape_with_error
from contracts.splits import N_HOLDOUTS, fitted_out_of_fold, roles, union_fitted_on
from contracts.workspace import Workspace
from training.settings import parse_settings
from word_models.config import WordModelSettings
from word_models.predict import log_price, prediction_meta, price_table

if TYPE_CHECKING:
    from word_models.features import Features


def main(argv: list[str] | None = None) -> dict[str, float]:
    settings = parse_settings(WordModelSettings, argv, description=__doc__.split("\n")[0])
    from training.run_folder import RunFolder
    from word_models.embedding_columns import EmbeddingColumns, read_embedding
    from word_models.facts import fact_kinds
    from word_models.features import FeatureBuilder
    from word_models.memory import require_memory
    from word_models.models import MODELS
    from word_models.saved import WordModel, features_of

    workspace = Workspace(settings.workspace)
    name = settings.prediction_name
    table = workspace.training_table()
    test = read_test_table(workspace)
    embeddings = {file: read_embedding(workspace, file, "train") for file in settings.embeddings}
    sample_ids = table["sample_id"].to_numpy()
    encoders = [EmbeddingColumns.fit(file, content, sample_ids) for file, content in embeddings.items()]
    if test is not None:
        # a test table that could not be priced is refused before anything is fitted
        for encoder in encoders:
            encoder.require_same_encoder(read_embedding(workspace, encoder.name, "test"))
    folder = workspace.path("run", name=name)
    require_own_folder(folder)
    others = [] if test is None else [test]
    texts = pd.concat([one["catalog_content"] for one in (table, *others)])
    require_memory(
        settings.model,
        rows=len(texts),
        characters=int(texts.str.len().sum()),
        embedding_columns=sum(content.width for content in embeddings.values()),
    )
    builder = FeatureBuilder.fit(table, others, facts=fact_kinds(workspace))
    features = features_of(builder, encoders, table, embeddings)

    price = table["price"].to_numpy()
    fold = table["fold"].to_numpy()
    ln_predicted, constant = predict_out_of_fold(settings, features, np.log(price), fold)
    model = MODELS[settings.model].fit(settings, features, np.log(price))

    # only now that everything is fitted does an earlier run of this name give way
    run = RunFolder.start(folder, settings, inputs=input_files(workspace, settings))
    # an encoder that has seen a row counts like a model that has seen it
    encoders_fitted_on = [content.meta["fitted_on"] for content in embeddings.values()]
    folds = union_fitted_on(fitted_out_of_fold(N_HOLDOUTS), *encoders_fitted_on)
    write_predictions(
        workspace,
        name,
        "train",
        sample_ids,
        log_price(ln_predicted),
        meta=prediction_meta(name, settings.model, folds),
        fold=fold,
    )
    score = report(name, price, np.exp(ln_predicted), constant)

    WordModel(settings.model, builder, encoders, model).save(run.path)
    if test is None:
        # the prices of an older model must not pass for those of this one
        remove_predictions(workspace, name, "test")
    else:
        # what is loaded prices the table, so the saved model is known to be whole
        price_table(workspace, name, WordModel.load(run.path), "test")
    run.finish(**score, rows=len(table), model=settings.model)
    return score


def read_test_table(workspace: Workspace) -> pd.DataFrame | None:
    """The prepared test table; None where the catalogue has none."""
    return workspace.prepared("test") if workspace.path("prepared", split="test").is_file() else None


def require_own_folder(folder: Path) -> None:
    """Raises InputError where another stage has its run: starting a run replaces what its folder held."""
    stored = folder / "settings.json"
    if stored.is_file() and "kernel_steps" not in read_json(stored):
        raise InputError(f"{folder}: the run of another stage; choose another name with --predictions")


def input_files(workspace: Workspace, settings: WordModelSettings) -> list[Path]:
    """The files that a run depends on, of which its manifest keeps the hashes."""
    files = [workspace.path("folds")]
    for table in ("train", "test"):
        files.append(workspace.path("prepared", split=table))
        files += [workspace.path("embeddings", name=name, split=table) for name in settings.embeddings]
    return [file for file in files if file.is_file()]


def predict_out_of_fold(
    settings: WordModelSettings, features: Features, ln_price: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the rows outside a row's hold-out say of it.

    Args:
        features: N rows.
        ln_price: (N,)
        fold: (N,) int.

    Returns:
        ln price (N,) by a model that was fitted on them; price (N,) by the one price that is best for them, which a
        useful model must beat.
    """
    from word_models.models import MODELS

    # every row is overwritten; NaN would show one that is not
    predicted = np.full(len(fold), np.nan)
    constant = np.full(len(fold), np.nan)
    for holdout in tqdm(range(N_HOLDOUTS), desc=f"{settings.model}, out of fold", unit=" hold-outs"):
        asked = np.isin(fold, roles(holdout).validate)
        model = MODELS[settings.model].fit(settings, features[~asked], ln_price[~asked])
        predicted[asked] = model.predict(features[asked])
        constant[asked] = best_constant(np.exp(ln_price[~asked]))
    return predicted, constant


def report(name: str, price: np.ndarray, predicted: np.ndarray, constant: np.ndarray) -> dict[str, float]:
    """Print the score of out-of-fold prices (N,) beside that of the constant prices (N,), and return both."""
    score, error = smape_with_error(price, predicted)
    of_constant, _ = smape_with_error(price, constant)
    print(
        f"{name}: out-of-fold SMAPE {score:.2f} ± {error:.2f} on {len(price)} rows; a constant {of_constant:.2f}"
    )
    if score > of_constant - error:
        print(f"{name}: no better than one constant price for all products; leave it out of the ensemble")
    return {"smape": score, "standard_error": error, "constant_smape": of_constant}


if __name__ == "__main__":
    run_entry_point(main)
