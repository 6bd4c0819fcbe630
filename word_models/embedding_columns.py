"""Embeddings beside the word counts: an encoder's view of meaning, and the columns that it names.

Legend: N rows of a table, D_in columns of an embedding file.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from contracts.embeddings import Embeddings, align, read_embeddings
from contracts.errors import InputError
from contracts.splits import N_FOLDS, leaked_folds, split_hash
from contracts.workspace import SPLITS, Workspace
from word_models.features import MIN_DEVIATION, Features
from word_models.meanings import unit_length


def read_embedding_files(workspace: Workspace, name: str) -> dict[str, Embeddings]:
    """The embedding file of each split.

    Raises:
        InputError: a file that is damaged or of other folds, one whose encoder was fitted on rows that it embeds (a
            model would learn to trust what the encoder remembers), or two files with different columns.
    """
    files = {split: _read(workspace, name, split) for split in SPLITS}
    train = files["train"]
    test = files["test"]
    if train.width != test.width or _named_columns(train) != _named_columns(test):
        raise InputError(
            f"{workspace.path('embeddings', name=name, split='test')}: {test.width} columns, the last ones named "
            f"{_named_columns(test)}, but the train file has {train.width}, named {_named_columns(train)}; "
            "extract both again with the same run"
        )
    return files


def add_embeddings(
    features: dict[str, Features], tables: dict[str, pd.DataFrame], name: str, files: dict[str, Embeddings]
) -> dict[str, Features]:
    """The features of both splits with the columns of one embedding file.

    The last columns of the file, those that its meta names (log price, amounts), become structural ones called
    "<file>: <column>", standardised on the training rows. The others are one more view of meaning. A row without an
    embedding gets the mean of the former and nothing of the latter.
    """
    aligned = {split: align(files[split], tables[split]["sample_id"].to_numpy(), name) for split in SPLITS}
    known = aligned["train"].embeddings[aligned["train"].valid]
    if len(known) == 0:
        raise InputError(f"--embeddings {name}: no training row has an embedding; extract it again")
    # of the training rows with an embedding, for both splits
    mean = known.mean(axis=0)
    deviation = known.std(axis=0) + MIN_DEVIATION

    named = _named_columns(files["train"])
    first_named = known.shape[1] - len(named)
    extended = {}
    for split in SPLITS:
        valid = aligned[split].valid[:, None]
        # encoders add a common direction to all embeddings; without it, cosines tell products apart
        centred = np.where(valid, aligned[split].embeddings - mean, 0).astype(np.float32)
        view = unit_length(centred[:, :first_named])
        standardised = centred[:, first_named:] / deviation[first_named:]
        columns = {f"{name}: {column}": standardised[:, [at]] for at, column in enumerate(named)}
        with_view = replace(features[split], meanings=(*features[split].meanings, view))
        extended[split] = with_view.with_columns(columns)
    return extended


def _named_columns(content: Embeddings) -> list[str]:
    return list(content.meta.get("last_columns", ()))


def _read(workspace: Workspace, name: str, split: str) -> Embeddings:
    path = workspace.path("embeddings", name=name, split=split)
    content = read_embeddings(path)
    if content.meta["split_hash"] != split_hash(workspace.folds()):
        raise InputError(f"{path}: made with another fold file than data/folds.csv; extract it again")
    if split == "test":
        return content  # no fold of test.csv can leak
    if folds := leaked_folds(content.meta["fitted_on"], tuple(range(N_FOLDS))):
        raise InputError(
            f"{path}: its encoder was fitted on rows that it embeds (folds {folds}); use an out-of-fold run "
            "(qwen3_finetune.train --folds 5) or a frozen encoder"
        )
    return content
