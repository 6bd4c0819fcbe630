"""The central promise, tested from the commands: no number over rows that a model has seen is called a score."""

import shutil

import numpy as np
import pandas as pd
import pytest

import ensemble.train
import qwen3_finetune.predict
import qwen3_finetune.train
import word_models.train
from contracts.errors import InputError
from contracts.files import read_json
from contracts.predictions import read_predictions
from contracts.smape import smape
from contracts.workspace import Workspace
from pipeline import scores

pytestmark = pytest.mark.slow


@pytest.fixture
def workspace(sample_workspace, tmp_path):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    return Workspace(tmp_path)


def train_text_encoder(workspace, *flags):
    """A text encoder that learns its rows by heart, and its prices of both tables."""
    where = ["--workspace", str(workspace.root)]
    how = ["--preset", "tiny", "--epochs", "3", "--token-dropout", "0", "--device", "cpu"]
    qwen3_finetune.train.main([*where, *how, *flags])
    for split in ("train", "test"):
        qwen3_finetune.predict.main([split, *where])


def printed_scores(workspace, *flags):
    scores.main(["--workspace", str(workspace.root), *flags])
    return pd.read_csv(workspace.path("scores")).set_index("model")


def test_a_model_of_all_rows_has_no_score_and_is_no_member(workspace, capsys):
    train_text_encoder(workspace, "--holdout", "null")
    table = printed_scores(workspace)
    assert table.index.tolist() == ["constant"]
    assert "not scored" in capsys.readouterr().out

    word_models.train.main(["--workspace", str(workspace.root), "--model", "ridge"])
    arguments = ["--workspace", str(workspace.root)]
    with pytest.raises(InputError, match="qwen3_finetune_train.csv: no honest score"):
        ensemble.train.main([*arguments, "--members", "words_ridge", "qwen3_finetune"])
    assert not workspace.path("submission").exists()
    summary = ensemble.train.main(arguments)  # left to itself it takes the honest one
    assert [line["model"] for line in summary["members"]] == ["words_ridge"]

    leaked = printed_scores(workspace, "--allow-leak")
    encoder = leaked.loc["text encoder's price head"]
    assert np.isnan(encoder["validation SMAPE"]) and encoder["leaked SMAPE"] > 0


def test_a_model_of_another_hold_out_is_scored_on_its_own_rows(workspace):
    train_text_encoder(workspace, "--holdout", "1")
    table = printed_scores(workspace)
    line = table.loc["text encoder's price head"]
    assert line["folds"] == "2 3"

    rows = workspace.training_table().set_index("sample_id")
    predicted = read_predictions(workspace, "qwen3_finetune", "train").by_id
    held_out = rows.index[rows["fold"].isin([2, 3])]
    expected = smape(rows.loc[held_out, "price"].to_numpy(), predicted[held_out].to_numpy())
    assert line["validation SMAPE"] == pytest.approx(expected, abs=0.006)
    assert line["rows"] == len(held_out)
    assert table.loc["constant", "folds"] == "2 3"


def test_an_edited_prediction_file_is_not_scored(workspace, capsys):
    word_models.train.main(["--workspace", str(workspace.root), "--model", "ridge"])
    path = workspace.path("predictions", name="words_ridge", split="train")
    table = pd.read_csv(path, dtype={"sample_id": str})
    rows = workspace.training_table().set_index("sample_id")
    table["log_price"] = np.log1p(rows.loc[table["sample_id"], "price"].to_numpy())
    table.to_csv(path, index=False)
    assert "words_ridge" not in printed_scores(workspace).index
    assert "sha256 differs" in capsys.readouterr().out
    with pytest.raises(InputError, match="sha256 differs"):
        ensemble.train.main(["--workspace", str(workspace.root), "--members", "words_ridge"])


def test_the_score_of_an_ensemble_names_what_it_rests_on(workspace):
    word_models.train.main(["--workspace", str(workspace.root), "--model", "ridge"])
    ensemble.train.main(["--workspace", str(workspace.root)])
    meta = read_json(workspace.path("predictions", name="ensemble", split="train").with_suffix(".csv.json"))
    assert meta["members"] == ["words_ridge"]
    assert all(fold not in seen for fold, seen in enumerate(meta["fitted_on"]))
    assert printed_scores(workspace).loc["ensemble", "folds"] == "0 1 2 3 4 5 6 7 8 9"
