"""Out-of-fold runs: which encoder sees which row, one space for all, and what fusion may score with them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from contracts.embeddings import read_embeddings
from contracts.errors import InputError
from contracts.splits import N_FOLDS, leaked_folds, roles
from contracts.workspace import Workspace
from qwen3_finetune import extract_embeddings, predict, train
from qwen3_finetune.config import ApplySettings
from qwen3_finetune.data import read_rows
from qwen3_finetune.finished import Alignment, FinishedRun, OutOfFoldRun, open_run

QUICK = ["--preset", "tiny", "--device", "cpu", "--epochs", "1", "--batch-size", "64", "--max-length", "32"]


@pytest.fixture(scope="module")
def out_of_fold(sample_workspace, tmp_path_factory) -> Path:
    """A workspace with a finished run of two folds; read only."""
    workspace = tmp_path_factory.mktemp("out_of_fold")
    shutil.copytree(sample_workspace / "data", workspace / "data")
    train.main([*QUICK, "--folds", "2", "--run", "oof", "--workspace", str(workspace)])
    return workspace


def test_alignment_recovers_a_rotation_and_a_shift():
    rng = np.random.default_rng(0)
    source = rng.normal(size=(200, 8)) * rng.uniform(0.5, 3, size=8)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    target = source @ rotation + rng.normal(size=8)
    alignment = Alignment.fit(source[:100], target[:100])
    np.testing.assert_allclose(alignment(source[100:]), target[100:], atol=1e-8)
    np.testing.assert_allclose(alignment.rotation @ alignment.rotation.T, np.eye(8), atol=1e-10)


@pytest.mark.parametrize("holdouts", [2, 5, 10])
def test_every_fold_is_validated_once_and_never_fitted_by_its_encoder(holdouts):
    validated = [fold for holdout in range(holdouts) for fold in roles(holdout, holdouts).validate]
    assert sorted(validated) == list(range(N_FOLDS))
    for holdout in range(holdouts):
        assert not set(roles(holdout, holdouts).validate) & set(roles(holdout, holdouts).fitted_on)


def test_each_training_row_comes_from_the_encoder_that_has_not_seen_it(out_of_fold):
    apply = ApplySettings(workspace=out_of_fold, run="oof", device="cpu")
    rows, run = read_rows(Workspace(out_of_fold), "train"), open_run(apply)
    assert isinstance(run, OutOfFoldRun)
    _, log_price = run.encode(rows)
    for holdout in range(2):
        part = FinishedRun(ApplySettings(workspace=out_of_fold, run=f"oof/fold_{holdout}", device="cpu"))
        validated = rows.of_folds(roles(holdout, 2).validate)
        assert part.settings.roles.validate == roles(holdout, 2).validate
        np.testing.assert_allclose(log_price[validated], part.encode(rows, validated)[1], atol=1e-4)
    # any part of the rows gives what the whole gives
    some = np.array([5, 250, 3])
    np.testing.assert_allclose(run.encode(rows, some)[1], log_price[some], atol=1e-4)


def test_the_embedding_file_says_who_saw_what_and_may_be_scored_on_any_fold(out_of_fold):
    workspace, matrices = Workspace(out_of_fold), {}
    for name, *flags in (("aligned",), ("as_they_are", "--no-align")):
        for split in ("train", "test"):
            extract_embeddings.main(
                [split, "--run", "oof", "--name", name, "--workspace", str(out_of_fold), "--device", "cpu", *flags]
            )  # fmt: skip
            matrices[name, split] = read_embeddings(workspace.path("embeddings", name=name, split=split))
    train_file, test_file = matrices["aligned", "train"], matrices["aligned", "test"]
    assert leaked_folds(train_file.meta["fitted_on"], tuple(range(N_FOLDS))) == []
    assert train_file.meta["last_columns"][0] == "log_price" and train_file.width == test_file.width
    assert train_file.meta["checkpoint"] == test_file.meta["checkpoint"]

    written = workspace.path("predictions", name="oof", split="train").read_text()
    predict.main(["train", "--run", "oof", "--workspace", str(out_of_fold), "--device", "cpu"])
    lines = (
        workspace.path("predictions", name="oof", split="train").read_text().splitlines()[1:]
    )  # id, price, fold
    np.testing.assert_allclose(
        train_file.embeddings[:, -4], [float(line.split(",")[1]) for line in lines], atol=1e-4
    )

    assert (
        written.splitlines()[1].split(",")[2] == lines[0].split(",")[2]
    )  # the extraction wrote the same table
    np.testing.assert_allclose(
        train_file.embeddings[:, -4],
        [float(line.split(",")[1]) for line in written.splitlines()[1:]],
        atol=1e-6,
    )

    # alignment moves the embedding only: the log price and the structural columns stay, test rows need no rotation
    other = matrices["as_they_are", "train"].embeddings
    np.testing.assert_array_equal(train_file.embeddings[:, -4:], other[:, -4:])
    assert np.abs(train_file.embeddings[:, :-4] - other[:, :-4]).max() > 1e-3
    np.testing.assert_array_equal(test_file.embeddings, matrices["as_they_are", "test"].embeddings)

    # of rows that no encoder of the two saw, the rotated embeddings lie nearer to those of the encoder of all rows
    rows = read_rows(workspace, "train")
    whole = FinishedRun(ApplySettings(workspace=out_of_fold, run="oof/all", device="cpu")).encode(rows)[0]
    distance = [np.linalg.norm(x[:, :-4] - whole[:, :-3]) for x in (train_file.embeddings, other)]
    assert distance[0] < 0.7 * distance[1]


def test_a_second_extraction_does_nothing_unless_the_texts_changed(out_of_fold, tmp_path, capsys):
    shutil.copytree(out_of_fold, tmp_path / "copy")
    command = ["test", "--run", "oof", "--workspace", str(tmp_path / "copy"), "--device", "cpu"]
    extract_embeddings.main(command)
    extract_embeddings.main(command)
    assert "made before" in capsys.readouterr().out
    prepared = Workspace(tmp_path / "copy").path("prepared", split="test")
    prepared.write_text(prepared.read_text().replace("Item Name", "Item name", 1))
    extract_embeddings.main(command)
    assert "made before" not in capsys.readouterr().out


def test_an_interrupted_run_goes_on_with_its_next_fold(out_of_fold, tmp_path, capsys):
    shutil.copytree(out_of_fold / "data", tmp_path / "data")
    command = [*QUICK, "--folds", "2", "--run", "oof", "--workspace", str(tmp_path)]
    train.main(command)
    folder = tmp_path / "checkpoints" / "oof"
    (folder / "COMPLETE").unlink()
    before = (folder / "all" / "head.safetensors").read_bytes()
    shutil.rmtree(folder / "all")
    train.main([*command, "--resume"])
    assert capsys.readouterr().out.count("this run is finished") == 2
    assert (folder / "all" / "head.safetensors").read_bytes() == before


def test_folds_that_do_not_divide_ten_are_refused(out_of_fold):
    with pytest.raises(InputError, match="2, 5 or 10"):
        train.main([*QUICK, "--folds", "3", "--workspace", str(out_of_fold)])
