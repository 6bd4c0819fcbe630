"""Fixtures of the word models: a workspace that a test may change, and embedding files in it."""

import shutil

import numpy as np
import pytest

from contracts.embeddings import Embeddings, write_embeddings
from contracts.splits import split_hash
from contracts.workspace import Workspace


@pytest.fixture(scope="module")
def tables(sample_workspace):
    """The prepared tables by split; read only."""
    workspace = Workspace(sample_workspace)
    return {"train": workspace.training_table(), "test": workspace.prepared("test")}


@pytest.fixture
def workspace(sample_workspace, tmp_path):
    """A copy of the sample workspace."""
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    return Workspace(tmp_path)


@pytest.fixture
def write_embedding(workspace):
    """Writes the embedding file "encoder" of a split: a matrix (N, D_in) whose last columns have names."""

    def write(split, matrix, fitted_on, *, names=("log_price",), valid=None, checkpoint="c"):
        sample_ids = workspace.prepared(split)["sample_id"].to_numpy(str)
        valid = np.ones(len(sample_ids), bool) if valid is None else valid
        meta = {
            "name": "encoder",
            "split": split,
            "model": "m",
            "stage": "qwen3_finetune",
            "run": "text",
            "checkpoint": checkpoint,
            "command": "test",
            "fitted_on": fitted_on,
            "last_columns": list(names),
            "split_hash": split_hash(workspace.folds()),
        }
        path = workspace.path("embeddings", name="encoder", split=split)
        write_embeddings(path, Embeddings(sample_ids, matrix.astype(np.float32), valid, meta))

    return write
