"""Embedding files for the fusion tests, of any content that a test wants to see again in a price."""

import shutil

import numpy as np
import pytest

from contracts import splits
from contracts.embeddings import Embeddings, write_embeddings
from contracts.workspace import Workspace


@pytest.fixture(scope="session")
def write_embedding():
    """write(workspace, split, name, matrix, ...) writes one embedding file for the rows of a prepared table."""

    def write(workspace, split, name, matrix, *, valid=None, encoder_folds=(), checkpoint="sha", **meta):
        """`matrix` (N, D_in) and `valid` (N,) are in the order of the table; `meta` is added to the file's."""
        ids = workspace.prepared(split)["sample_id"].to_numpy(str)
        meta = {
            "name": name,
            "split": split,
            "model": "synthetic",
            "checkpoint": checkpoint,
            "command": "test",
            "fitted_on": splits.fitted_on(encoder_folds=encoder_folds),
            "split_hash": splits.split_hash(workspace.folds()),
            **meta,
        }
        valid = np.ones(len(ids), bool) if valid is None else valid
        content = Embeddings(ids, np.asarray(matrix, np.float32), valid, meta)
        write_embeddings(workspace.path("embeddings", name=name, split=split), content)

    return write


@pytest.fixture(scope="module")
def empty_workspace(sample_workspace, tmp_path_factory) -> Workspace:
    """The prepared sample catalogue without embeddings, for one test module to fill."""
    folder = tmp_path_factory.mktemp("fusion")
    shutil.copytree(sample_workspace / "data", folder / "data")
    return Workspace(folder)
