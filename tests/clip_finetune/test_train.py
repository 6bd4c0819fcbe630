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
from clip_finetune.encoder import Encoder
from contracts.embeddings import align, read_embeddings
from contracts.errors import InputError
from contracts.files import read_json, sidecar_of
from contracts.predictions import read_predictions
from contracts.smape import smape
from contracts.splits import roles, split_hash
from contracts.workspace import CLIP_IMAGE, Workspace
from training.extraction import ShardedExtraction
from training.run_folder import RunFolder
from training.weights import weights_hash

FLAGS = [
    "--preset", "tiny", "--device", "cpu", "--batch-size", "32", "--gradient-accumulation-steps", "2", "--epochs", "2",
]  # fmt: skip


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
    run_train(workspace, "--epochs", "3", "--gradient-accumulation-steps", "1")
    extract(workspace, "train", "--shard-rows", "150")
    extract(workspace, "test")
    return workspace


def test_run_folder(finished):
    run = RunFolder(finished / "checkpoints/clip_finetune")
    assert run.complete
    assert sorted(file.name for file in run.path.iterdir()) == [
        "COMPLETE", "manifest.json", "metrics.jsonl", "open_clip_config.json", "open_clip_model.safetensors",
        "price_head.safetensors", "settings.json", "summary.json", "training_curves.png",
    ]  # fmt: skip
    losses = [line["train/loss"] for line in run.metrics() if "train/loss" in line]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    summary = json.loads((run.path / "summary.json").read_text())
    counts = summary["pictures"]
    assert summary["trained"] and sum(counts.values()) + summary["rows_without_usable_picture"] == 400
    scores = [line["stop/smape"] for line in run.metrics() if "stop/smape" in line]
    assert summary["best"]["smape"] == min(scores) and len(scores) == 3
    assert 0 < summary["validate"]["smape"] < 200 and 0 <= summary["validate"]["recall@1"] <= 1


def test_every_file_of_a_run_can_be_read_by_all(finished):
    """safetensors alone would leave its files to their owner."""
    files = [file for file in (finished / "checkpoints/clip_finetune").rglob("*") if file.is_file()]
    assert {file.name: file.stat().st_mode & 0o777 for file in files} == {file.name: 0o644 for file in files}


@pytest.mark.parametrize("split", ["train", "test"])
def test_embeddings_keep_the_contract(finished, split):
    workspace = Workspace(finished)
    table = workspace.prepared(split)
    content = read_embeddings(workspace.path("embeddings", name=CLIP_IMAGE, split=split))
    assert content.sample_ids.tolist() == table["sample_id"].tolist() and content.width == 64
    lengths = np.linalg.norm(content.embeddings, axis=1)
    assert np.allclose(lengths[content.valid], 1, atol=1e-5) and not lengths[~content.valid].any()
    assert content.meta["fitted_on"] == [list(roles(0).fitted_on)] * 10
    assert content.meta["split_hash"] == split_hash(workspace.folds()) and content.meta["split"] == split
    assert content.meta["stage"] == content.meta["run"] == "clip_finetune"
    assert content.meta["checkpoint"] == weights_hash(workspace.path("run", name="clip_finetune"))

    failed = pd.read_csv(workspace.path("image_failures", name=CLIP_IMAGE, split=split), dtype=str)
    assert failed["sample_id"].tolist() == content.sample_ids[~content.valid].tolist()
    reasons = failed["reason"].tolist()
    assert "missing" in reasons and "not a picture" in reasons
    assert any(reason.startswith("damaged") for reason in reasons)

    predictions = read_predictions(workspace, "clip_finetune", split)
    assert predictions.sample_ids.tolist() == content.sample_ids[content.valid].tolist()
    assert (predictions.log_price > 0).all()
    for entry in ("checkpoint", "fitted_on"):
        assert predictions.meta[entry] == content.meta[entry]
    assert predictions.meta["stage"] == predictions.meta["model"] == "clip_finetune"
    if split == "train":
        assert set(predictions.fold[predictions.unseen]) == set(roles(0).validate)


def test_a_further_table_is_embedded_and_priced(finished, tmp_path):
    """By the command and by the encoder object alike, and as the same products were embedded in train."""
    shutil.copytree(finished, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy")
    table = workspace.prepared("train").iloc[40:0:-1].drop(columns="price")
    table.to_csv(workspace.path("prepared", split="new"), index=False)
    content = extract(workspace.root, "new", "--shard-rows", "15")
    assert content.meta["split"] == "new" and content.sample_ids.tolist() == table["sample_id"].tolist()
    of_train = read_embeddings(workspace.path("embeddings", name=CLIP_IMAGE, split="train"))
    of_train = align(of_train, content.sample_ids)
    assert np.array_equal(content.valid, of_train.valid)
    np.testing.assert_allclose(content.embeddings, of_train.embeddings, atol=1e-5)

    predictions = read_predictions(workspace, "clip_finetune", "new")
    assert predictions.fold is None and len(predictions.price) == content.valid.sum()

    encoder = Encoder.open(workspace.path("run", name="clip_finetune"), device="cpu")
    encoded = encoder.encode(workspace.prepared("new"), workspace.images_folder())
    np.testing.assert_allclose(encoded.embeddings, content.embeddings, atol=1e-5)
    assert np.array_equal(encoded.valid, content.valid)
    assert encoded.meta.items() <= content.meta.items() and encoded.width == encoder.width == 64
    failed = pd.read_csv(workspace.path("image_failures", name=CLIP_IMAGE, split="new"), dtype=str)
    assert encoder.reasons == dict(zip(failed["sample_id"], failed["reason"], strict=True)) != {}


def test_an_encoder_gives_a_row_the_same_embedding_alone_and_among_others(finished):
    workspace = Workspace(finished)
    table, images = workspace.prepared("test").head(12), workspace.images_folder()
    encoder = Encoder.open(workspace.path("run", name="clip_finetune"), device="cpu", batch_size=5)
    together = encoder.encode(table, images)
    reversed_order = encoder.encode(table[::-1], images)
    np.testing.assert_allclose(reversed_order.embeddings[::-1], together.embeddings, atol=1e-5)
    for row in range(len(table)):
        alone = encoder.encode(table.iloc[[row]], images)
        np.testing.assert_allclose(alone.embeddings[0], together.embeddings[row], atol=1e-5)
        assert alone.valid[0] == together.valid[row]

    # without a folder no picture is there; without rows there is nothing to embed
    assert not encoder.encode(table).valid.any() and set(encoder.reasons.values()) == {"missing"}
    assert encoder.encode(table.head(0), images).embeddings.shape == (0, 64) and encoder.reasons == {}


def test_a_table_that_was_not_prepared_is_one_line(finished):
    with pytest.raises(
        InputError, match="prepared_absent.csv: no prepared table; run python -m data.prepare"
    ):
        extract(finished, "absent")


def test_predictions_agree_with_the_score_of_the_run(finished):
    """The SMAPE in summary.json follows again from the files that extraction wrote."""
    workspace = Workspace(finished)
    predictions = read_predictions(workspace, "clip_finetune", "train")
    price = workspace.prepared("train").set_index("sample_id")["price"].loc[predictions.sample_ids].to_numpy()
    summary = read_json(finished / "checkpoints/clip_finetune/summary.json")
    score = smape(price[predictions.unseen], predictions.price[predictions.unseen])
    assert score == pytest.approx(summary["validate"]["smape"], abs=1e-3)


def test_interrupted_extraction_continues(finished, tmp_path, monkeypatch, killed_at):
    workspace = tmp_path / "copy"
    shutil.copytree(finished, workspace)
    expected = read_embeddings(workspace / "data/embeddings/clip_image_train.pkl")
    failed = workspace / "data/image_failures_clip_image_train.csv"
    listed = failed.read_text()
    failed.unlink()
    with killed_at(ShardedExtraction, "write", 3):
        extract(workspace, "train", "--shard-rows", "100")

    written, write = [], ShardedExtraction.write
    monkeypatch.setattr(
        ShardedExtraction, "write",
        lambda self, rows, *content: (written.append(rows.start), write(self, rows, *content)),
    )  # fmt: skip
    content = extract(workspace, "train", "--shard-rows", "100")
    assert written == [200, 300]  # of four shards two were done
    assert np.array_equal(content.valid, expected.valid)
    assert np.allclose(content.embeddings, expected.embeddings, atol=1e-6)
    assert failed.read_text() == listed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint_steps", "log_call", "last"),
    [(2, 6, 4), (3, 4, 3)],
    ids=["in the second epoch", "before the first evaluation"],
)
def test_resumed_run_equals_uninterrupted(
    sample_workspace, tmp_path, killed_at, checkpoint_steps, log_call, last
):
    """Stopped between the checkpoint of step `last` and the next logged line; an epoch has three steps."""
    flags = [
        "--checkpoint-steps",
        str(checkpoint_steps),
        "--unfreeze-blocks",
        "1",
        "--unfreeze-per-epoch",
        "1",
    ]
    whole = copy_workspace(sample_workspace, tmp_path / "whole", rows=220)
    stopped = copy_workspace(sample_workspace, tmp_path / "stopped", rows=220)
    run_train(whole, *flags)
    with killed_at(RunFolder, "log", log_call):
        run_train(stopped, *flags)
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


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_best_epoch_is_kept(sample_workspace, tmp_path, monkeypatch, killed_at, interrupted):
    """Of three epochs, of one step each, the second is the best. The run is interrupted in the third."""
    import clip_finetune.evaluation

    workspace, seen = copy_workspace(sample_workspace, tmp_path / "best", rows=60), []

    def evaluate(model, *_):
        seen.append({name: value.clone() for name, value in model.clip.state_dict().items()})
        return {"smape": [50.0, 40.0, 60.0, 0.0][len(seen) - 1]}  # the fourth is the validation

    monkeypatch.setattr(clip_finetune.evaluation, "evaluate", evaluate)
    flags = ["--epochs", "3"]
    if interrupted:
        with killed_at(RunFolder, "log", 5):  # two lines per epoch
            run_train(workspace, *flags)
        assert len(seen) == 2
        flags.append("--resume")
    assert run_train(workspace, *flags)["best"] == {"epoch": 2, "score": 40.0, "smape": 40.0}
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
    sidecar_of(stale).write_text("{}")
    summary = run_train(workspace, "--price-weight", "0", "--epochs", "1")
    assert "smape" not in summary["validate"] and "recall@1" in summary["validate"]
    assert extract(workspace, "train").valid.any()
    assert not stale.exists() and not sidecar_of(stale).exists()


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        ("8", "clip_finetune: loss is NaN at step 2; lower --lr"),
        ("32", "clip_finetune: the model gives NaN for a picture or text; lower --lr"),
    ],
    ids=["in the next step", "in the evaluation after the epoch's only step"],
)
def test_weights_beyond_float32_end_the_run_with_one_line(sample_workspace, tmp_path, batch_size, message):
    workspace = copy_workspace(sample_workspace, tmp_path / "nan", rows=60)
    with pytest.raises(InputError, match=message):
        run_train(workspace, "--lr", "1e30", "--warmup-ratio", "0", "--batch-size", batch_size)
    with pytest.raises(InputError, match="no finished run"):
        extract(workspace, "train")


def test_the_learning_rate_rises_then_falls(finished):
    """Over 24 steps: 0.1 of them, rounded to 2, are the warm-up; the rate of the last step is not yet zero."""
    logged = [
        line["lr"] for line in RunFolder(finished / "checkpoints/clip_finetune").metrics() if "lr" in line
    ]
    assert len(logged) == 27
    assert logged[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert np.all(np.diff(logged[2:4]) <= 0) and np.all(np.diff(logged[3:]) < 0) and logged[-1] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("main", [train.main, lambda flags: extract_embeddings.main(["train", *flags])])
def test_an_absent_device_is_one_line(finished, main):
    with pytest.raises(InputError, match="--device cuda:1: this torch sees no CUDA device"):
        main(["--device", "cuda:1", "--workspace", str(finished)])


def test_the_numbered_device_is_used(sample_workspace, tmp_path):
    """With two CUDA devices, which torch is told that there are, and up to the point where the model would move."""
    workspace = copy_workspace(sample_workspace, tmp_path / "cuda", rows=60)
    code = f"""
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.set_device = lambda device: None
from clip_finetune import train
train.usable_rows = lambda settings, model, accelerator: exit(str(accelerator.device))
flags = ["--preset", "tiny", "--precision", "fp32", "--device", "cuda:1", "--workspace", {str(workspace)!r}]
train.main(flags)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stderr.strip().splitlines()[-1] == "cuda:1"


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

    flags = ["--epochs", "1", "--gradient-accumulation-steps", "2", "--warmup-ratio", "0", "--workers", "0"]
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
