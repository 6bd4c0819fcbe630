"""The promise of the prediction file, tested from the commands: fitted rows do not pass for unseen."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from contracts.embeddings import read_embeddings
from contracts.errors import InputError
from contracts.files import read_json, sidecar_of
from contracts.predictions import read_predictions
from contracts.workspace import Workspace
from qwen3_finetune import extract_embeddings, predict, train
from training.weights import weights_hash

QUICK = ["--preset", "tiny", "--device", "cpu", "--epochs", "1", "--batch-size", "64", "--max-length", "32"]


@pytest.fixture
def root(sample_workspace, tmp_path) -> Path:
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    return tmp_path


def run(program, root: Path, *arguments: str) -> None:
    program.main([*arguments, "--workspace", str(root), "--device", "cpu"])


def test_no_row_is_unseen_by_a_model_of_all_rows(root):
    run(train, root, *QUICK, "--holdout", "null")
    run(predict, root, "train")
    predictions = read_predictions(Workspace(root), "qwen3_finetune", "train")
    assert not predictions.unseen.any()
    with pytest.raises(
        InputError, match="qwen3_finetune_train.csv: no honest score: its model was fitted on"
    ):
        predictions.require_unseen()


def test_exactly_the_validation_rows_are_unseen(root):
    run(train, root, *QUICK, "--holdout", "1")
    run(predict, root, "train")
    predictions = read_predictions(Workspace(root), "qwen3_finetune", "train")
    folds = Workspace(root).folds()[predictions.sample_ids].to_numpy()
    np.testing.assert_array_equal(predictions.unseen, np.isin(folds, [2, 3]))
    with pytest.raises(InputError, match="no honest score"):
        predictions.require_unseen()


def test_every_row_is_unseen_out_of_fold(root):
    run(train, root, *QUICK, "--folds", "2", "--run", "oof")
    run(extract_embeddings, root, "train", "--run", "oof")
    predictions = read_predictions(Workspace(root), "oof", "train")
    assert len(predictions.unseen) == 400
    assert predictions.unseen.all()
    predictions.require_unseen()

    run(predict, root, "train", "--run", "oof")
    again = read_predictions(Workspace(root), "oof", "train")
    again.require_unseen()
    np.testing.assert_allclose(again.log_price, predictions.log_price, atol=1e-5)


def test_the_head_of_a_frozen_encoder_has_seen_its_rows(root):
    """The embeddings of a frozen encoder count as fitted on nothing, but not the prices of its head."""
    run(train, root, *QUICK, "--train", "head")
    run(extract_embeddings, root, "train")
    run(predict, root, "train")
    embeddings = read_embeddings(Workspace(root).path("embeddings", name="qwen_text", split="train"))
    assert embeddings.meta["fitted_on"] == [[]] * 10
    predictions = read_predictions(Workspace(root), "qwen3_finetune", "train")
    np.testing.assert_array_equal(predictions.unseen, np.isin(predictions.fold, [0, 1]))


def test_the_file_says_which_weights_made_it(root):
    run(train, root, *QUICK)
    run(predict, root, "test")
    workspace = Workspace(root)
    path = workspace.path("predictions", name="qwen3_finetune", split="test")
    assert path.read_text().splitlines()[0] == "sample_id,log_price"
    meta = read_json(sidecar_of(path))
    assert (meta["stage"], meta["model"]) == ("qwen3_finetune", "qwen3_finetune")
    assert meta["checkpoint"] == weights_hash(workspace.path("run", name="qwen3_finetune"))
    predictions = read_predictions(workspace, "qwen3_finetune", "test")
    assert predictions.sample_ids.tolist() == workspace.prepared("test")["sample_id"].tolist()
    assert (predictions.log_price > 0).all()


def test_a_further_table_is_priced_by_its_name(root):
    run(train, root, *QUICK, "--folds", "2", "--run", "oof")
    workspace = Workspace(root)
    shutil.copy(workspace.path("prepared", split="test"), workspace.path("prepared", split="new"))
    for table in ("test", "new"):
        run(extract_embeddings, root, table, "--run", "oof")
        run(predict, root, table, "--run", "oof")
    test, new = (read_predictions(workspace, "oof", table) for table in ("test", "new"))
    np.testing.assert_array_equal(new.log_price, test.log_price)
    assert new.fold is None
    embeddings = read_embeddings(workspace.path("embeddings", name="qwen_text", split="new"))
    assert embeddings.sample_ids.tolist() == test.sample_ids.tolist()
