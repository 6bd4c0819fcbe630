"""Price a prepared table by a saved model.

    python -m word_models.predict new --run words_boosted_frozen_text --workspace OUT

reads data/prepared_new.csv and the embedding files that the model was fitted with, data/embeddings/<name>_new.pkl, and
writes predictions/words_boosted_frozen_text_new.csv.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import InputError, run_entry_point
from contracts.predictions import write_predictions
from contracts.splits import N_FOLDS, fitted_on
from contracts.workspace import REPOSITORY, Workspace
from training.settings import parse_settings

if TYPE_CHECKING:
    from word_models.saved import WordModel


@dataclass
class PredictSettings:
    workspace: Path = REPOSITORY
    """Folder with data/ and checkpoints/; the prices are written there."""
    run: str = "words_mlp"
    """Name of the saved model under checkpoints/."""


def main(argv: list[str] | None = None) -> Path:
    settings, table = parse_settings(
        PredictSettings, argv, description=__doc__.split("\n")[0], positional={"table": None}
    )
    from word_models.saved import WordModel

    if table == "train":
        raise InputError(
            "train: the saved model was fitted on these rows; word_models.train writes their out-of-fold prices"
        )
    workspace = Workspace(settings.workspace)
    model = WordModel.load(workspace.path("run", name=settings.run))
    return price_table(workspace, settings.run, model, table)


def price_table(workspace: Workspace, run: str, model: WordModel, table: str) -> Path:
    """Write predictions/<run>_<table>.csv, the prices that a model of all training rows gives to another table."""
    from word_models.embedding_columns import read_embedding

    prepared = workspace.prepared(table)
    embeddings = {name: read_embedding(workspace, name, table) for name in model.embeddings}
    ln_price = model.predict(prepared, embeddings)
    path = write_predictions(
        workspace,
        run,
        table,
        prepared["sample_id"].to_numpy(),
        log_price(ln_price),
        meta=prediction_meta(run, model.kind, fitted_on(encoder_folds=tuple(range(N_FOLDS)))),
    )
    print(f"{path}: {len(prepared)} prices, median {np.median(np.exp(ln_price)):.2f}")
    return path


def prediction_meta(run: str, kind: str, folds: list[list[int]]) -> dict[str, object]:
    """What the prediction files of a run say of their model; `folds` is their `fitted_on`."""
    return {"stage": "word_models.train", "model": run, "kind": kind, "fitted_on": folds}


def log_price(ln_price: np.ndarray) -> np.ndarray:
    """ln of dollars → log1p of dollars, the unit of prediction files."""
    return np.log1p(np.exp(ln_price))


if __name__ == "__main__":
    run_entry_point(main)
