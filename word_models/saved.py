"""A fitted model on words as it is kept: `checkpoints/<run>/`, and how it prices any prepared table.

    model = WordModel.load(Path("OUT/checkpoints/words_boosted_frozen_text"))
    ln_price = model.predict(prepared, {name: embeddings_of(name) for name in model.embeddings})

checkpoints/<run>/word_model.json    what the folder holds; written last of these
                  features/          vocabularies and facts (json); weights, views of meaning and scaling (npz)
                  embeddings/        per embedding file: its encoder and named columns (json), its scaling (npz)
                  model/             the fitted model: npz, safetensors, LightGBM's own text

Nothing is pickled, so a folder from a stranger cannot run code. Beside these the folder holds what every run folder
does (`training.run_folder`).

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from contracts.embeddings import Embeddings
from contracts.errors import InputError
from contracts.files import read_versioned, write_json
from training.sealed import require_whole
from word_models.embedding_columns import EmbeddingColumns
from word_models.features import FeatureBuilder, Features
from word_models.models import MODELS, Model

SCHEMA = 1
FILE = "word_model.json"


@dataclass
class WordModel:
    """Everything between a prepared table and its prices."""

    kind: str
    """one of MODELS"""
    builder: FeatureBuilder
    encoders: list[EmbeddingColumns]
    """one per embedding file, in the order of the columns that they add"""
    model: Model

    @property
    def embeddings(self) -> dict[str, dict[str, Any]]:
        """The embedding files that the model reads, each with the `stage`, `run` and `checkpoint` of its encoder.

        An entry is None where the meta of the training file lacks it: a frozen encoder has no run.
        """
        return {encoder.name: encoder.encoder for encoder in self.encoders}

    def predict(self, prepared: pd.DataFrame, embeddings: dict[str, Embeddings] | None = None) -> np.ndarray:
        """ln price (N,) float64 of a prepared table's rows; a row's price does not depend on the other rows.

        Args:
            prepared: as `Workspace.prepared` reads it; a price is not needed.
            embeddings: of these rows, at least those that `embeddings` names. A row without one is priced as one of
                mean embedding.

        Raises:
            InputError: an embedding is missing, was made by another encoder, or is of other rows; or the table lacks
                a column of further facts.
        """
        if len(prepared) == 0:
            return np.zeros(0)
        return self.model.predict(features_of(self.builder, self.encoders, prepared, embeddings or {}))

    def save(self, folder: Path) -> None:
        """Write the model into `folder`."""
        self.builder.save(folder / "features")
        for encoder in self.encoders:
            encoder.save(folder / "embeddings")
        (folder / "model").mkdir(parents=True, exist_ok=True)
        self.model.save(folder / "model")
        content = {"schema": SCHEMA, "model": self.kind, "embeddings": list(self.embeddings)}
        write_json(folder / FILE, content)

    @classmethod
    def load(cls, folder: Path) -> WordModel:
        """Raises InputError: no model of words in this folder, one of another version, or a damaged one."""
        path = folder / FILE
        if not path.is_file():
            raise InputError(f"{path}: no saved model; run python -m word_models.train")
        require_whole(folder)
        content = read_versioned(path, SCHEMA, "train it again")
        kind = content.get("model")
        if kind not in MODELS:
            raise InputError(
                f"{path}: model {kind!r}; this version knows {', '.join(MODELS)}; train it again"
            )
        encoders = [EmbeddingColumns.load(folder / "embeddings", name) for name in content["embeddings"]]
        return cls(
            kind, FeatureBuilder.load(folder / "features"), encoders, MODELS[kind].load(folder / "model")
        )


def features_of(
    builder: FeatureBuilder,
    encoders: Iterable[EmbeddingColumns],
    prepared: pd.DataFrame,
    embeddings: dict[str, Embeddings],
) -> Features:
    """What a model sees of a prepared table and its embeddings, which are given by name."""
    features = builder(prepared)
    sample_ids = prepared["sample_id"].to_numpy()
    for encoder in encoders:
        if encoder.name not in embeddings:
            raise InputError(f"embedding {encoder.name}: the model reads it, but it is not given; extract it")
        features = encoder.add_to(features, sample_ids, embeddings[encoder.name])
    return features
