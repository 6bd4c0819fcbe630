"""The fusion packages as a user runs them, on embeddings whose price signal is known."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from contracts import splits
from contracts.catalog import read_table
from contracts.embeddings import Embeddings, read_embeddings, write_embeddings
from contracts.errors import InputError
from contracts.files import read_json
from contracts.smape import smape
from contracts.workspace import Workspace
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.all_embeddings.config import AllEmbeddingsSettings
from fusion.dataset import load_table
from fusion.loop import Target, hide_modalities, predict
from fusion.qwen_clip import evaluate_by_groups as pair_evaluate
from fusion.qwen_clip import predict_test as pair_predict
from fusion.qwen_clip import train as pair_train

WIDTHS = {"clip_image": 12, "siglip_image": 10, "siglip_text": 8, "qwen_text": 11}
QUICK = [
    "--preset",
    "tiny",
    "--width",
    "16",
    "--heads",
    "2",
    "--epochs",
    "25",
    "--batch-size",
    "64",
    "--device",
    "cpu",
]


def embed(workspace, split, name, encoder_folds, checkpoint="sha"):
    """Embeddings that hold part of the log price: images one half, texts the other, 10 % of images missing."""
    rows = workspace.prepared(split)
    generator = np.random.default_rng(len(name) + len(split))
    log_price = np.log1p(rows["price"]) if split == "train" else generator.normal(2.6, 1, len(rows))
    halves = np.random.default_rng(len(rows)).normal(size=len(rows))  # the same for every name
    signal = (np.asarray(log_price) - 2.6) / 2 + (halves if name.endswith("image") else -halves)
    projection = np.random.default_rng(7).normal(size=(1, WIDTHS[name]))
    matrix = (signal[:, None] * projection + generator.normal(size=(len(rows), WIDTHS[name])) * 0.1).astype(
        np.float32
    )
    valid = generator.random(len(rows)) > 0.1 if name.endswith("image") else np.ones(len(rows), bool)
    meta = {
        "name": name, "split": split, "model": "synthetic", "checkpoint": checkpoint, "command": "test",
        "fitted_on": splits.fitted_on(encoder_folds=encoder_folds),
        "split_hash": splits.split_hash(workspace.folds()),
    }  # fmt: skip
    content = Embeddings(rows["sample_id"].to_numpy(str), matrix, valid, meta)
    write_embeddings(workspace.path("embeddings", name=name, split=split), content)


@pytest.fixture(scope="module")
def embedded(sample_workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    shutil.copytree(sample_workspace / "data", folder / "data")
    workspace = Workspace(folder)
    for name in WIDTHS:
        fitted = splits.roles(0).fitted_on if name in ("clip_image", "qwen_text") else ()
        for split in ("train", "test"):
            embed(workspace, split, name, fitted)
    return workspace


@pytest.fixture
def workspace(embedded, tmp_path):
    shutil.copytree(embedded.root, tmp_path, dirs_exist_ok=True)
    return Workspace(tmp_path)


def at(workspace, *flags):
    return ["--workspace", str(workspace.root), *flags]


def test_train_evaluate_predict(workspace):
    summary = train.main(at(workspace, *QUICK))
    table = workspace.prepared("train").set_index("sample_id")
    held_out = table["price"][workspace.folds()[table.index].isin(splits.roles(0).validate)]
    assert summary["rows"] == len(held_out)
    assert summary["validation_smape"] < 0.6 * smape(held_out, np.full(len(held_out), held_out.median()))

    written = read_table(
        workspace.path("predictions", name="fusion_all_embeddings", split="train")
    ).set_index("sample_id")
    assert set(written.index) == set(held_out.index)  # only rows that nothing was fitted on
    predicted = np.expm1(written["log_price"].astype(float))
    assert smape(held_out, predicted[held_out.index]) == pytest.approx(summary["validation_smape"], abs=0.01)

    again = evaluate_by_groups.main(at(workspace))
    assert again["validation_smape"] == summary["validation_smape"]
    folder = workspace.path("run", name="fusion_all_embeddings")
    groups = pd.read_csv(folder / "by_group.csv")
    assert set(groups["grouping"]) == {"all", "price", "unit kind", "present"}
    assert groups.groupby("grouping")["rows"].sum().nunique() == 1
    for name in (
        "training_curves.png",
        "error_by_price.png",
        "error_by_group.png",
        "manifest.json",
        "COMPLETE",
    ):
        assert (folder / name).stat().st_size > 0 or name == "COMPLETE"

    predict_test.main(at(workspace))
    submission = read_table(workspace.path("submission"))
    assert list(submission.columns) == ["sample_id", "price"]
    assert submission["sample_id"].tolist() == workspace.prepared("test")["sample_id"].tolist()
    price = submission["price"].astype(float)
    assert np.isfinite(price).all() and (price > 0).all()


@pytest.mark.parametrize("design", ["attention_moe", "plain", "concat", "gate", "moe", "cross_attention"])
def test_two_embedding_designs_learn(workspace, design):
    flags = [
        "--preset",
        "tiny",
        "--hidden",
        "16",
        "--heads",
        "2",
        "--epochs",
        "40",
        "--design",
        design,
        "--device",
        "cpu",
    ]
    summary = pair_train.main(at(workspace, *flags))
    assert summary["validation_smape"] < 55  # the constant is about 70
    assert pair_evaluate.main(at(workspace))["validation_smape"] == summary["validation_smape"]
    pair_predict.main(at(workspace, "--out", str(workspace.root / "pair.csv")))
    assert len(read_table(workspace.root / "pair.csv")) == 60


def test_leak_is_refused_or_named(workspace):
    embed(workspace, "train", "qwen_text", splits.roles(1).fitted_on)
    with pytest.raises(InputError, match="no honest validation score.*qwen_text.*--allow-leak"):
        train.main(at(workspace, *QUICK))
    summary = train.main(at(workspace, *QUICK, "--allow-leak"))
    assert "leaked_smape" in summary and "validation_smape" not in summary
    assert not workspace.path("predictions", name="fusion_all_embeddings", split="train").exists()
    left_out = train.main(at(workspace, *QUICK, "--use", "clip_image", "siglip_image", "siglip_text"))
    assert "validation_smape" in left_out  # the leaking encoder is not used


def test_embeddings_of_another_split_are_refused(workspace):
    folds = workspace.folds().reset_index()
    folds.columns = ["sample_id", "fold"]
    folds["fold"] = (folds["fold"] + 1) % 10
    splits.write_folds(workspace.path("folds"), folds)
    with pytest.raises(InputError, match="clip_image_train.pkl: made with another fold file"):
        train.main(at(workspace, *QUICK))


def test_wrong_width_at_prediction_is_refused(workspace):
    train.main(at(workspace, *QUICK, "--epochs", "1"))
    path = workspace.path("embeddings", name="siglip_text", split="test")
    content = read_embeddings(path)
    content.embeddings = content.embeddings[:, :-1]
    write_embeddings(path, content)
    with pytest.raises(
        InputError, match="siglip_text_test.pkl: width 7, but fusion_all_embeddings was trained with 8"
    ):
        predict_test.main(at(workspace))
    assert not workspace.path("submission").exists()


def test_test_embeddings_of_another_encoder_are_refused(workspace):
    train.main(at(workspace, *QUICK, "--epochs", "1"))
    embed(workspace, "test", "clip_image", (), checkpoint="another")
    with pytest.raises(InputError, match="clip_image_test.pkl: made by another encoder"):
        predict_test.main(at(workspace))


def test_left_out_embeddings_need_no_file(workspace):
    for split in ("train", "test"):
        for name in ("clip_image", "siglip_image"):
            workspace.path("embeddings", name=name, split=split).unlink()
            path = workspace.path("embeddings", name=name, split=split)
            path.with_name(path.name + ".json").unlink()
    with pytest.raises(InputError, match="clip_image_train.pkl: no such embedding file"):
        train.main(at(workspace, *QUICK))
    train.main(at(workspace, *QUICK, "--use", "siglip_text", "qwen_text"))
    predict_test.main(at(workspace))
    assert len(read_table(workspace.path("submission"))) == 60
    with pytest.raises(InputError, match="--use bert: choose from"):
        train.main(at(workspace, *QUICK, "--use", "bert"))


def test_shuffled_rows_change_no_prediction(workspace):
    train.main(at(workspace, *QUICK, "--epochs", "2"))
    predict_test.main(at(workspace))
    before = read_table(workspace.path("submission")).set_index("sample_id")["price"]
    path = workspace.path("embeddings", name="clip_image", split="test")
    content = read_embeddings(path)
    order = np.random.default_rng(0).permutation(len(content.valid))
    shuffled = Embeddings(
        content.sample_ids[order], content.embeddings[order], content.valid[order], content.meta
    )
    write_embeddings(path, shuffled)
    predict_test.main(at(workspace))
    after = read_table(workspace.path("submission")).set_index("sample_id")["price"]
    pd.testing.assert_series_equal(before, after)


def test_resumed_equals_uninterrupted(workspace, monkeypatch):
    flags = [*QUICK, "--epochs", "6", "--checkpoint-epochs", "2", "--dropout", "0.3"]
    whole = train.main(at(workspace, *flags, "--run", "whole"))

    from training.run_folder import RunFolder

    log = RunFolder.log

    def killed_at_epoch_5(self, step, **values):
        if step == 5:
            raise KeyboardInterrupt
        log(self, step, **values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "log", killed_at_epoch_5)
        train.main(at(workspace, *flags, "--run", "parts"))
    parts = train.main(at(workspace, *flags, "--run", "parts", "--resume"))
    assert parts == whole
    curves = [RunFolder(workspace.path("run", name=name)).metrics() for name in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert train.main(at(workspace, *flags, "--run", "parts", "--resume")) == parts  # already complete


def test_final_model_without_validation(workspace):
    summary = train.main(at(workspace, *QUICK, "--epochs", "2", "--holdout", "null"))
    assert "validation_smape" not in summary
    predict_test.main(at(workspace))
    with pytest.raises(InputError, match="--holdout null"):
        evaluate_by_groups.main(at(workspace))


def test_price_target_and_auxiliary_task_learn(workspace):
    by_price = train.main(at(workspace, *QUICK, "--target", "price"))
    assert by_price["validation_smape"] < 60
    assert train.main(at(workspace, *QUICK, "--auxiliary-under-15"))["validation_smape"] < 55


def test_modality_dropout_hides_but_never_everything():
    torch.manual_seed(0)
    valid = torch.tensor([[True, True, True, False]] * 4000 + [[False, True, False, False]] * 100)
    kept = hide_modalities(valid, 0.4)
    assert not (kept & ~valid).any()
    assert kept.any(dim=1).all()
    assert (kept[4000:] == valid[4000:]).all()
    hidden = 1 - kept[:4000, :3].float().mean().item()
    assert hidden == pytest.approx(0.4 - 0.4**3, abs=0.02)  # a row that would lose all three keeps all
    assert hide_modalities(valid, 0.0) is valid


def test_row_without_any_embedding_gets_a_finite_price(workspace):
    train.main(at(workspace, *QUICK, "--epochs", "3"))
    for name in WIDTHS:
        path = workspace.path("embeddings", name=name, split="test")
        content = read_embeddings(path)
        content.valid[:5] = False
        write_embeddings(path, content)
    predict_test.main(at(workspace))
    price = read_table(workspace.path("submission"))["price"].astype(float)
    assert price[:5].nunique() == 1 and 1 < price[0] < 200


def test_nan_loss_ends_the_run_in_one_line(workspace):
    with pytest.raises(InputError, match="train/loss is NaN at step 1"):
        train.main(at(workspace, *QUICK, "--lr", "1e30"))


@pytest.mark.parametrize("flag", ["--batch-size", "--lr", "--epochs", "--patience"])
def test_senseless_settings_are_refused(workspace, flag):
    with pytest.raises(InputError, match=flag):
        train.main(at(workspace, flag, "0"))


def test_batching_at_prediction_changes_nothing(workspace):
    table = load_table(workspace, "test", tuple(WIDTHS))
    torch.manual_seed(0)
    settings = AllEmbeddingsSettings(width=16, heads=2)
    from fusion.all_embeddings.config import build_model

    model, target = build_model(settings, table.widths), Target(settings, 2.6, 20.0)
    rows = torch.arange(60)
    torch.testing.assert_close(
        predict(model, table, rows, target, 7), predict(model, table, rows, target, 60)
    )


def test_summary_and_settings_stand_in_the_run_folder(workspace):
    train.main(at(workspace, *QUICK, "--epochs", "1", "--variant", "tokens", "--report-to", "tensorboard"))
    folder = workspace.path("run", name="fusion_all_embeddings")
    assert read_json(folder / "settings.json")["variant"] == "tokens"
    assert read_json(folder / "inputs.json")["widths"] == WIDTHS
    assert list((folder / "tensorboard").glob("events*"))
