"""Embeddings beside the word counts: an encoder's view of meaning, and the columns that it names.

Legend: N rows of a table, D_in columns of an embedding file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from contracts.embeddings import Embeddings, align, read_embeddings
from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.splits import N_FOLDS, leaked_folds, split_hash
from contracts.workspace import Workspace
from word_models.amounts import MIN_DEVIATION
from word_models.features import Features
from word_models.meanings import unit_length

ENCODER_KEYS = ("stage", "run", "checkpoint")
"""What the meta of an embedding file says of the encoder that made it."""


def read_embedding(workspace: Workspace, name: str, table: str) -> Embeddings:
    """The embedding file `name` of a table.

    Raises:
        InputError: a file that is damaged; of the training table also one that was made with other folds, or whose
            encoder was fitted on rows that it embeds (a model would learn to trust what the encoder remembers).
    """
    path = workspace.path("embeddings", name=name, split=table)
    content = read_embeddings(path)
    if table != "train":
        return content  # only training rows have folds, and can leak
    if content.meta["split_hash"] != split_hash(workspace.folds()):
        raise InputError(f"{path}: made with another fold file than data/folds.csv; extract it again")
    if folds := leaked_folds(content.meta["fitted_on"], tuple(range(N_FOLDS))):
        raise InputError(
            f"{path}: its encoder was fitted on rows that it embeds (folds {folds}); use an out-of-fold run "
            "(qwen3_finetune.train --folds 5) or a frozen encoder"
        )
    return content


@dataclass
class EmbeddingColumns:
    """How an embedding file becomes columns of the features.

    The last columns of the file, those that its meta names (log price, amounts), become structural ones called
    "<file>: <column>", standardised on the training rows. The others are one more view of meaning. A row without an
    embedding gets the mean of the former and nothing of the latter.
    """

    name: str
    """of the embedding file"""
    encoder: dict[str, Any]
    """ENCODER_KEYS of the training file: embeddings of two encoders live in different spaces"""
    named: tuple[str, ...]
    """names of the last columns"""
    mean: np.ndarray
    """(D_in,) float32 of the training rows with an embedding"""
    deviation: np.ndarray
    """(D_in,) float32 of the same"""

    @classmethod
    def fit(cls, name: str, content: Embeddings, sample_ids: np.ndarray) -> EmbeddingColumns:
        """From the embedding file of the training table, whose ids are (N,). Raises InputError for one without rows."""
        aligned = align(content, sample_ids, name)
        known = aligned.embeddings[aligned.valid]
        if len(known) == 0:
            raise InputError(f"--embeddings {name}: no training row has an embedding; extract it again")
        encoder = {key: content.meta.get(key) for key in ENCODER_KEYS}
        return cls(
            name, encoder, _named_columns(content), known.mean(axis=0), known.std(axis=0) + MIN_DEVIATION
        )

    def add_to(self, features: Features, sample_ids: np.ndarray, content: Embeddings) -> Features:
        """The features of a table with its embeddings; the table's ids are (N,).

        Raises:
            InputError: the embeddings come from another encoder, have other columns, or belong to other rows.
        """
        self.require_same_encoder(content)
        aligned = align(content, sample_ids, self.name)
        # encoders add a common direction to all embeddings; without it, cosines tell products apart
        centred = np.where(aligned.valid[:, None], aligned.embeddings - self.mean, 0).astype(np.float32)
        first_named = len(self.mean) - len(self.named)
        view = unit_length(centred[:, :first_named])
        standardised = centred[:, first_named:] / self.deviation[first_named:]
        columns = {f"{self.name}: {column}": standardised[:, [at]] for at, column in enumerate(self.named)}
        return replace(features, meanings=(*features.meanings, view)).with_columns(columns)

    def require_same_encoder(self, content: Embeddings) -> None:
        """Raises InputError for embeddings of another encoder or with other columns; the message names the file."""
        file = f"{self.name}_{content.meta.get('split', 'table')}.pkl"
        checkpoint = content.meta.get("checkpoint")
        if checkpoint != self.encoder["checkpoint"]:
            made_by = f"run {self.encoder['run']}" if self.encoder["run"] else "the encoder"
            raise InputError(
                f"{file}: made by checkpoint {checkpoint}, but the model was fitted on embeddings of {made_by}, "
                f"checkpoint {self.encoder['checkpoint']}; extract it with the same encoder"
            )
        named = _named_columns(content)
        if content.width != len(self.mean) or named != self.named:
            raise InputError(
                f"{file}: {content.width} columns, the last ones named {list(named)}, but the train file has "
                f"{len(self.mean)}, named {list(self.named)}; extract both again with the same run"
            )

    def save(self, folder: Path) -> None:
        """Write <name>.json (encoder and named columns) and <name>.npz."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / f"{self.name}.json", {"name": self.name, "encoder": self.encoder, "named": self.named}
        )
        np.savez(folder / f"{self.name}.npz", mean=self.mean, deviation=self.deviation)

    @classmethod
    def load(cls, folder: Path, name: str) -> EmbeddingColumns:
        content = read_json(folder / f"{name}.json")
        with np.load(folder / f"{name}.npz") as scaling:
            return cls(
                content["name"],
                content["encoder"],
                tuple(content["named"]),
                scaling["mean"],
                scaling["deviation"],
            )


def _named_columns(content: Embeddings) -> tuple[str, ...]:
    return tuple(content.meta.get("last_columns", ()))
