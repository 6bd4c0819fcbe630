"""Training and extraction end to end with the tiny model, and what must survive interruptions and bad pictures."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from clip_finetune import extract_embeddings, train
from contracts.embeddings import read_embeddings
from contracts.errors import InputError
from contracts.splits import roles, split_hash
from contracts.workspace import Workspace
from training.run_folder import RunFolder

FLAGS = ["--preset", "tiny", "--device", "cpu", "--batch-size", "32", "--grad-accum", "2", "--epochs", "2"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def copy_workspace(source, target, rows=None):
    """A workspace of its own with the first `rows` rows of each table; the pictures stay where they are."""
    (target / "data").mkdir(parents=True)
    shutil.copy(source / "data/catalog.json", target / "data")
    for name in ("prepared_train", "prepared_test", "folds"):
        table = pd.read_csv(source / f"data/{name}.csv", dtype=str, keep_default_na=False)
        table.head(rows or len(table)).to_csv(target / f"data/{name}.csv", index=False)
    return target


def set_images_folder(workspace, folder):
    path = workspace / "data/catalog.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images_folder": str(folder)}))


def run_train(workspace, *flags):
    train.main([*FLAGS, "--workspace", str(workspace), *flags])
    return json.loads((workspace / "checkpoints/clip_finetune/summary.json").read_text())


def extract(workspace, split, *flags):
    extract_embeddings.main([split, "--workspace", str(workspace), "--device", "cpu", *flags])
    return read_embeddings(workspace / f"data/embeddings/clip_image_{split}.pkl")


@pytest.fixture(scope="module")
def finished(sample_workspace, tmp_path_factory):
    """A workspace after training and extraction; read only."""
    workspace = copy_workspace(sample_workspace, tmp_path_factory.mktemp("clip") / "finished")
    run_train(workspace, "--epochs", "3", "--grad-accum", "1")
    extract(workspace, "train", "--shard-rows", "150")
    extract(workspace, "test")
    return workspace


def test_run_folder(finished):
    run = RunFolder(finished / "checkpoints/clip_finetune")
    assert run.complete and not list(run.path.glob("step_*")) and not list(run.path.glob("best_*"))
    names = {file.name for file in run.path.iterdir()}
    assert {"settings.json", "manifest.json", "training_curves.png", "open_clip_model.safetensors"} <= names
    steps = [line for line in run.metrics() if "train/loss" in line]
    first, last = (np.mean([line["train/loss"] for line in part]) for part in (steps[:4], steps[-4:]))
    assert last < 0.9 * first
    summary = json.loads((run.path / "summary.json").read_text())
    counts = summary["pictures"]
    assert summary["trained"] and sum(counts.values()) + summary["rows_without_usable_picture"] == 400
    scores = [line["stop/smape"] for line in run.metrics() if "stop/smape" in line]
    assert summary["best"]["smape"] == min(scores) and len(scores) == 3
    assert 0 < summary["validate"]["smape"] < 200 and 0 <= summary["validate"]["recall@1"] <= 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_embeddings_keep_the_contract(finished, split):
    workspace = Workspace(finished)
    table = workspace.prepared(split)
    content = read_embeddings(workspace.path("embeddings", name="clip_image", split=split))
    assert content.sample_ids.tolist() == table["sample_id"].tolist() and content.width == 64
    lengths = np.linalg.norm(content.embeddings, axis=1)
    assert np.allclose(lengths[content.valid], 1, atol=1e-5) and not lengths[~content.valid].any()
    assert content.meta["fitted_on"] == [list(roles(0).fitted_on)] * 10
    assert content.meta["split_hash"] == split_hash(workspace.folds()) and content.meta["split"] == split

    failed = pd.read_csv(workspace.path("image_failures", name="clip_image", split=split), dtype=str)
    assert failed["sample_id"].tolist() == content.sample_ids[~content.valid].tolist()
    reasons = failed["reason"].tolist()
    assert "missing" in reasons and "not a picture" in reasons
    assert any(reason.startswith("damaged") for reason in reasons)

    predictions = pd.read_csv(
        workspace.path("predictions", name="clip_finetune", split=split), dtype={"sample_id": str}
    )
    assert predictions["sample_id"].tolist() == content.sample_ids[content.valid].tolist()
    assert (predictions["log_price"] > 0).all()
    if split == "train":
        assert (predictions["fold"] == workspace.folds().loc[predictions["sample_id"]].to_numpy()).all()


def test_predictions_agree_with_the_score_of_the_run(finished):
    """The SMAPE in summary.json follows again from the files that extraction wrote."""
    from contracts.smape import smape

    workspace = Workspace(finished)
    predictions = pd.read_csv(
        workspace.path("predictions", name="clip_finetune", split="train"), dtype={"sample_id": str}
    )
    price = workspace.prepared("train").set_index("sample_id")["price"]
    held = predictions[predictions["fold"].isin(roles(0).validate)]
    summary = json.loads((finished / "checkpoints/clip_finetune/summary.json").read_text())
    score = smape(price.loc[held["sample_id"]].to_numpy(), np.expm1(held["log_price"].to_numpy()))
    assert score == pytest.approx(summary["validate"]["smape"], abs=1e-3)


def test_interrupted_extraction_continues(finished, tmp_path, monkeypatch):
    workspace = tmp_path / "copy"
    shutil.copytree(finished, workspace)
    path, calls, embed = workspace / "data/embeddings/clip_image_train.pkl", [], extract_embeddings.embed
    expected = read_embeddings(path)

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(*args)

    monkeypatch.setattr(extract_embeddings, "embed", failing)
    with pytest.raises(KeyboardInterrupt):
        extract(workspace, "train", "--shard-rows", "100")
    content = extract(workspace, "train", "--shard-rows", "100")
    assert len(calls) == 3 + 2  # of four shards two were done
    assert np.array_equal(content.valid, expected.valid)
    assert np.allclose(content.embeddings, expected.embeddings, atol=1e-6)


@pytest.mark.parametrize("last", [4, 3], ids=["in the second epoch", "before the first evaluation"])
def test_resumed_run_equals_uninterrupted(sample_workspace, tmp_path, monkeypatch, last):
    """Stopped just after the checkpoint of step `last`; an epoch has three steps."""
    flags = [
        "--checkpoint-steps",
        "2" if last == 4 else "3",
        "--unfreeze-blocks",
        "1",
        "--unfreeze-per-epoch",
        "1",
    ]
    whole, stopped = (
        copy_workspace(sample_workspace, tmp_path / name, rows=220) for name in ("whole", "stopped")
    )
    run_train(whole, *flags)

    save = RunFolder.save_checkpoint

    def save_and_stop(run, step, *args):
        save(run, step, *args)
        if step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_train(stopped, *flags)
    monkeypatch.undo()
    logged = RunFolder(stopped / "checkpoints/clip_finetune").metrics()
    assert logged[-1]["step"] == last and "epoch" not in logged[-1]
    assert len([line for line in logged if "epoch" in line]) == last - 3
    run_train(stopped, *flags, "--resume")

    runs = [RunFolder(folder / "checkpoints/clip_finetune") for folder in (whole, stopped)]
    assert runs[0].metrics() == runs[1].metrics()
    weights = [load_file(run.path / "open_clip_model.safetensors") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    before = (stopped / "checkpoints/clip_finetune/summary.json").read_text()
    run_train(stopped, *flags, "--resume")  # a finished run is left alone
    assert (stopped / "checkpoints/clip_finetune/summary.json").read_text() == before


def test_the_best_epoch_is_kept(sample_workspace, tmp_path, monkeypatch):
    import clip_finetune.evaluation

    workspace, seen = copy_workspace(sample_workspace, tmp_path / "best", rows=60), []

    def evaluate(model, *_):
        seen.append({name: value.clone() for name, value in model.clip.state_dict().items()})
        return {"smape": [50.0, 40.0, 60.0, 0.0][len(seen) - 1]}  # the fourth is the validation

    monkeypatch.setattr(clip_finetune.evaluation, "evaluate", evaluate)
    assert run_train(workspace, "--epochs", "3")["best"] == {"epoch": 2, "score": 40.0, "smape": 40.0}
    saved = load_file(workspace / "checkpoints/clip_finetune/open_clip_model.safetensors")
    assert all(torch.equal(saved[name], seen[1][name]) for name in saved)
    assert not torch.equal(saved["logit_scale"], seen[2]["logit_scale"])


def test_catalogue_without_pictures(sample_workspace, tmp_path, capsys):
    workspace = copy_workspace(sample_workspace, tmp_path / "none", rows=60)
    set_images_folder(workspace, tmp_path / "nowhere")
    summary = run_train(workspace)
    assert not summary["trained"] and summary["rows_without_usable_picture"] == 60
    assert "0 pictures to fit are too few" in capsys.readouterr().out
    for split in ("train", "test"):
        content = extract(workspace, split)
        assert not content.valid.any() and content.meta["fitted_on"] == [[]] * 10
        assert not Workspace(workspace).path("predictions", name="clip_finetune", split=split).exists()


def test_few_pictures(sample_workspace, tmp_path):
    """Three pictures to fit, none to stop on: the last epoch is kept."""
    workspace = copy_workspace(sample_workspace, tmp_path / "few", rows=60)
    table, folds = Workspace(workspace).prepared("train"), Workspace(workspace).folds()
    fit = [sample_id for sample_id in table["sample_id"] if folds[sample_id] in roles(0).fit]
    table.loc[~table["sample_id"].isin(fit[20:23]), "image"] = ""
    table.to_csv(workspace / "data/prepared_train.csv", index=False)
    summary = run_train(workspace)
    assert summary["pictures"] == {"fit": 3, "stop": 0, "validate": 0}
    assert summary["trained"] and summary["best"]["epoch"] == 2 and summary["validate"] == {}


def test_price_part_off(sample_workspace, tmp_path):
    workspace = copy_workspace(sample_workspace, tmp_path / "off", rows=80)
    stale = Workspace(workspace).path("predictions", name="clip_finetune", split="train")
    stale.parent.mkdir()
    stale.write_text("sample_id,log_price,fold\n")
    summary = run_train(workspace, "--price-weight", "0", "--epochs", "1")
    assert "smape" not in summary["validate"] and "recall@1" in summary["validate"]
    assert extract(workspace, "train").valid.any()
    assert not stale.exists()


def test_a_loss_that_is_not_a_number_ends_the_run(sample_workspace, tmp_path, monkeypatch):
    import clip_finetune.loss

    workspace = copy_workspace(sample_workspace, tmp_path / "nan", rows=60)
    monkeypatch.setattr(
        clip_finetune.loss, "price_loss", lambda predicted, *_: predicted.sum() * float("nan")
    )
    with pytest.raises(InputError, match="the loss is nan at step 1; lower --lr"):
        run_train(workspace)
    with pytest.raises(InputError, match="no finished run"):
        extract(workspace, "train")


def test_learning_rate_rises_then_falls():
    factors = [train.learning_rate_factor(step, 100, 0.1) for step in range(1, 101)]
    assert factors[4] == pytest.approx(0.5) and max(factors) == factors[9] == 1.0
    assert factors[-1] > 0 and np.all(np.diff(factors[9:]) < 0)
    assert train.learning_rate_factor(1, 1, 0.1) > 0.1  # a run of one step learns something


@pytest.mark.slow
def test_two_processes(sample_workspace, tmp_path):
    """Over gloo: two processes of batch 8 train as one of batch 16, and embed as one. 64 pictures: no odd step."""
    one, two = (copy_workspace(sample_workspace, tmp_path / name, rows=120) for name in ("one", "two"))
    table, fold = Workspace(one).prepared("train"), Workspace(one).folds()
    present = [(Workspace(one).images_folder() / name).is_file() for name in table["image"]]
    fit = np.flatnonzero(fold.loc[table["sample_id"]].isin(roles(0).fit).to_numpy() & present)
    table.loc[fit[64:], "image"] = ""
    for workspace in (one, two):
        table.to_csv(workspace / "data/prepared_train.csv", index=False)

    def torchrun(module, *flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        flags = [*flags, "--workspace", str(two), "--device", "cpu"]
        subprocess.run([*command, "-m", module, "--", *flags], check=True, timeout=300)

    flags = ["--epochs", "1", "--grad-accum", "2", "--warmup", "0", "--workers", "0"]
    assert run_train(one, *flags, "--batch-size", "16")["pictures"]["fit"] == 64
    torchrun("clip_finetune.train", *FLAGS, *flags, "--batch-size", "8")
    metrics = [RunFolder(folder / "checkpoints/clip_finetune").metrics() for folder in (one, two)]
    assert len(metrics[0]) == len(metrics[1]) == 2 + 1
    for alone, shared in zip(*metrics, strict=True):
        assert shared == pytest.approx(alone, rel=1e-5)

    shutil.copytree(one / "checkpoints", two / "checkpoints", dirs_exist_ok=True)
    alone = extract(one, "train")
    torchrun("clip_finetune.extract_embeddings", "train", "--shard-rows", "50")
    shared = read_embeddings(two / "data/embeddings/clip_image_train.pkl")
    assert alone.sample_ids.tolist() == shared.sample_ids.tolist()
    assert np.array_equal(shared.valid, alone.valid) and alone.valid.sum() > 64
    assert np.allclose(shared.embeddings, alone.embeddings, atol=1e-5)
