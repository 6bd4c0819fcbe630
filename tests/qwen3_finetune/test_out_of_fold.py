"""Out-of-fold runs: which encoder sees which row, one space for all, and what fusion may score with them."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from contracts.embeddings import read_embeddings
from contracts.errors import InputError
from contracts.predictions import read_predictions
from contracts.splits import N_FOLDS, leaked_folds, roles
from contracts.workspace import Workspace
from qwen3_finetune import evaluate, extract_embeddings, predict, train
from qwen3_finetune.data import read_rows
from qwen3_finetune.finished import Computation, FinishedRun, OutOfFoldRun
from training.run_folder import RunFolder

ON_CPU = Computation(device="cpu")
QUICK = ["--preset", "tiny", "--device", "cpu", "--epochs", "1", "--batch-size", "64", "--max-length", "32"]


@pytest.fixture(scope="module")
def out_of_fold(sample_workspace, tmp_path_factory) -> Path:
    """A workspace with a finished run of two folds; read only."""
    workspace = tmp_path_factory.mktemp("out_of_fold")
    shutil.copytree(sample_workspace / "data", workspace / "data")
    train.main([*QUICK, "--folds", "2", "--run", "oof", "--workspace", str(workspace)])
    return workspace


@pytest.fixture(scope="module")
def extracted(out_of_fold, tmp_path_factory) -> Path:
    """The same workspace with its embeddings, aligned and as the encoders made them; read only."""
    root = tmp_path_factory.mktemp("extracted")
    shutil.copytree(out_of_fold, root, dirs_exist_ok=True)
    for split in ("train", "test"):
        command = [split, "--run", "oof", "--workspace", str(root), "--device", "cpu"]
        extract_embeddings.main([*command, "--embedding", "aligned"])
        extract_embeddings.main([*command, "--embedding", "as_they_are", "--no-align"])
    return root


def embedding(root: Path, name: str, split: str):
    return read_embeddings(Workspace(root).path("embeddings", name=name, split=split))


@pytest.mark.parametrize("holdouts", [2, 5, 10])
def test_every_fold_is_validated_once_and_never_fitted_by_its_encoder(holdouts):
    validated = [fold for holdout in range(holdouts) for fold in roles(holdout, holdouts).validate]
    assert sorted(validated) == list(range(N_FOLDS))
    for holdout in range(holdouts):
        assert not set(roles(holdout, holdouts).validate) & set(roles(holdout, holdouts).fitted_on)


def test_each_training_row_comes_from_the_encoder_that_has_not_seen_it(out_of_fold):
    rows = read_rows(Workspace(out_of_fold), "train")
    run = OutOfFoldRun(out_of_fold / "checkpoints/oof", ON_CPU)
    _, log_price = run.encode(rows)
    for holdout in range(2):
        part = FinishedRun(out_of_fold / f"checkpoints/oof/fold_{holdout}", ON_CPU)
        validated = rows.of_folds(roles(holdout, 2).validate)
        assert part.settings.roles.validate == roles(holdout, 2).validate
        np.testing.assert_allclose(log_price[validated], part.encode(rows, validated)[1], atol=1e-4)
    # any part of the rows gives what the whole gives
    some = np.array([5, 250, 3])
    np.testing.assert_allclose(run.encode(rows, some)[1], log_price[some], atol=1e-4)


def test_the_embedding_file_may_be_scored_on_any_fold(extracted):
    train_file = embedding(extracted, "aligned", "train")
    test_file = embedding(extracted, "aligned", "test")
    assert leaked_folds(train_file.meta["fitted_on"], tuple(range(N_FOLDS))) == []
    assert train_file.meta["last_columns"][0] == "log_price"
    assert train_file.width == test_file.width == 64 + 1 + 3
    assert train_file.meta["checkpoint"] == test_file.meta["checkpoint"]


def test_the_prices_stand_in_the_embedding_file_and_in_the_predictions(extracted):
    for split in ("train", "test"):
        predictions = read_predictions(Workspace(extracted), "oof", split)
        content = embedding(extracted, "aligned", split)
        assert predictions.sample_ids.tolist() == content.sample_ids.tolist()
        np.testing.assert_allclose(content.embeddings[:, -4], predictions.log_price, atol=1e-6)


def test_alignment_moves_the_embeddings_of_training_rows_and_nothing_else(extracted):
    aligned = embedding(extracted, "aligned", "train").embeddings
    other = embedding(extracted, "as_they_are", "train").embeddings
    np.testing.assert_array_equal(aligned[:, -4:], other[:, -4:])
    assert np.abs(aligned[:, :-4] - other[:, :-4]).max() > 1e-3
    np.testing.assert_array_equal(
        embedding(extracted, "aligned", "test").embeddings,
        embedding(extracted, "as_they_are", "test").embeddings,
    )

    # of rows that no encoder of the two saw, the rotated embeddings lie nearer to those of the encoder of all rows
    rows = read_rows(Workspace(extracted), "train")
    whole, _ = FinishedRun(extracted / "checkpoints/oof/all", ON_CPU).encode(rows)
    distance, distance_without = (
        np.linalg.norm(embeddings[:, :-4] - whole[:, :-3]) for embeddings in (aligned, other)
    )
    assert distance < 0.7 * distance_without


def test_row_without_text_is_invalid_but_priced(out_of_fold, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(out_of_fold, root)
    path = Workspace(root).path("prepared", split="test")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[3, ["entity_name", "catalog_content", "text"]] = ["", "", " [SEP] "]
    table.to_csv(path, index=False)
    command = ["test", "--run", "oof", "--workspace", str(root), "--device", "cpu"]
    extract_embeddings.main(command)
    content = embedding(root, "qwen_text", "test")
    assert np.flatnonzero(~content.valid).tolist() == [3]
    assert not content.embeddings[3].any()
    extracted_prices = read_predictions(Workspace(root), "oof", "test").log_price
    predict.main(command)
    predicted_prices = read_predictions(Workspace(root), "oof", "test").log_price
    np.testing.assert_allclose(extracted_prices, predicted_prices, atol=1e-5)


def test_a_second_extraction_does_nothing_unless_the_texts_changed(out_of_fold, tmp_path, capsys):
    shutil.copytree(out_of_fold, tmp_path / "copy")
    command = ["test", "--run", "oof", "--workspace", str(tmp_path / "copy"), "--device", "cpu"]
    extract_embeddings.main(command)
    extract_embeddings.main(command)
    assert "up to date" in capsys.readouterr().out
    prepared = Workspace(tmp_path / "copy").path("prepared", split="test")
    prepared.write_text(prepared.read_text().replace("Item Name", "Item name", 1))
    extract_embeddings.main(command)
    assert "up to date" not in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_its_next_part(out_of_fold, tmp_path, capsys, killed_at):
    shutil.copytree(out_of_fold / "data", tmp_path / "data")
    command = [*QUICK, "--folds", "2", "--run", "oof", "--workspace", str(tmp_path)]
    with killed_at(RunFolder, "finish", 3):  # of the encoder of all rows, after those of both folds
        train.main(command)
    with pytest.raises(InputError, match="no finished run"):
        predict.main(["test", "--run", "oof", "--workspace", str(tmp_path)])
    capsys.readouterr()
    train.main([*command, "--resume"])
    printed = capsys.readouterr().out
    assert printed.count("this run is complete") == 2
    assert "epoch 1:" not in printed  # also the last part had finished its training
    for part in ("fold_0", "fold_1", "all"):
        head = f"checkpoints/oof/{part}/head.safetensors"
        assert (tmp_path / head).read_bytes() == (out_of_fold / head).read_bytes()

    train.main([*command, "--resume"])
    assert capsys.readouterr().out.count("this run is complete") == 1


def test_one_encoder_must_be_chosen_for_an_evaluation(out_of_fold):
    with pytest.raises(InputError, match="one encoder per hold-out; choose one, such as --run oof/fold_0"):
        evaluate.main(["--run", "oof", "--workspace", str(out_of_fold), "--device", "cpu"])


def test_folds_that_do_not_divide_ten_are_refused(out_of_fold):
    with pytest.raises(InputError, match="2, 5 or 10"):
        train.main([*QUICK, "--folds", "3", "--workspace", str(out_of_fold)])
