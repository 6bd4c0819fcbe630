"""The fusion packages as a user runs them, on embeddings whose price signal is known."""

import shutil
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch

from contracts import splits
from contracts.catalog import read_table
from contracts.embeddings import Embeddings, read_embeddings, write_embeddings
from contracts.errors import InputError
from contracts.files import read_json, sidecar_of, write_json
from contracts.predictions import prediction_names, read_predictions
from contracts.smape import smape
from contracts.workspace import Workspace
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.all_embeddings.config import AllEmbeddingsSettings
from fusion.all_embeddings.model import AllEmbeddings
from fusion.dataset import load_table
from fusion.loop import hide_modalities, predict
from fusion.qwen_clip import evaluate_by_groups as pair_evaluate
from fusion.qwen_clip import predict_test as pair_predict
from fusion.qwen_clip import train as pair_train
from fusion.qwen_clip.config import Design
from fusion.target import Target
from training.run_folder import RunFolder

WIDTHS = {"clip_image": 12, "siglip_image": 10, "siglip_text": 8, "qwen_text": 11}
QUICK = [
    "--preset", "tiny", "--width", "16", "--heads", "2", "--epochs", "25", "--batch-size", "64", "--device", "cpu",
]  # fmt: skip
RUN = AllEmbeddingsSettings.run


@pytest.fixture(scope="module")
def embed(write_embedding):
    """embed(workspace, split, name, ...) writes embeddings that hold part of the log price.

    Images hold one half and texts the other; a tenth of the images is missing.
    """

    def write(workspace, split, name, encoder_folds=(), checkpoint="sha"):
        rows = workspace.prepared(split)
        generator = np.random.default_rng(len(name) + len(split))
        is_image = name.endswith("image")
        log_price = np.log1p(rows["price"]) if split == "train" else generator.normal(2.6, 1, len(rows))
        halves = np.random.default_rng(len(rows)).normal(size=len(rows))  # the same for every name
        signal = (np.asarray(log_price) - 2.6) / 2 + (halves if is_image else -halves)
        projection = np.random.default_rng(7).normal(size=(1, WIDTHS[name]))
        noise = generator.normal(size=(len(rows), WIDTHS[name])) * 0.1
        write_embedding(
            workspace,
            split,
            name,
            signal[:, None] * projection + noise,
            valid=generator.random(len(rows)) > 0.1 if is_image else None,
            encoder_folds=encoder_folds,
            checkpoint=checkpoint,
        )

    return write


@pytest.fixture(scope="module")
def embedded(empty_workspace, embed):
    for name in WIDTHS:
        fitted = splits.roles(0).fitted_on if name in ("clip_image", "qwen_text") else ()
        for split in ("train", "test"):
            embed(empty_workspace, split, name, fitted)
    return empty_workspace


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

    written = read_predictions(workspace, RUN, "train")
    assert set(written.sample_ids) == set(held_out.index)  # only rows that nothing was fitted on
    assert written.unseen.all()
    score = smape(held_out, written.by_id[held_out.index])
    assert score == pytest.approx(summary["validation_smape"], abs=0.01)

    again = evaluate_by_groups.main(at(workspace))
    assert again["validation_smape"] == summary["validation_smape"]
    folder = workspace.path("run", name=RUN)
    groups = pd.read_csv(folder / "by_group.csv")
    assert set(groups["grouping"]) == {"all", "price", "unit kind", "what is present"}
    assert groups.groupby("grouping")["rows"].sum().nunique() == 1
    for name in ("training_curves.png", "error_by_price.png", "error_by_group.png", "manifest.json"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "COMPLETE").exists()

    predict_test.main(at(workspace))
    submission = read_table(workspace.path("submission"))
    assert list(submission.columns) == ["sample_id", "price"]
    assert submission["sample_id"].tolist() == workspace.prepared("test")["sample_id"].tolist()
    price = submission["price"].astype(float)
    assert np.isfinite(price).all() and (price > 0).all()
    predictions = read_predictions(workspace, RUN, "test")
    np.testing.assert_allclose(predictions.price, price, atol=1e-4)


@pytest.mark.parametrize("design", get_args(Design))
def test_two_embedding_designs_learn(workspace, design):
    flags = ["--preset", "tiny", "--hidden", "16", "--heads", "2", "--epochs", "40", "--device", "cpu"]
    summary = pair_train.main(at(workspace, *flags, "--design", design))
    assert summary["validation_smape"] < 55  # the constant is about 70
    assert pair_evaluate.main(at(workspace))["validation_smape"] == summary["validation_smape"]
    pair_predict.main(at(workspace, "--out", str(workspace.root / "pair.csv")))
    assert len(read_table(workspace.root / "pair.csv")) == 60


def test_leak_is_refused_or_named(workspace, embed):
    train.main(at(workspace, *QUICK, "--epochs", "1"))
    predict_test.main(at(workspace))
    assert prediction_names(workspace, "train") == prediction_names(workspace, "test") == [RUN]

    embed(workspace, "train", "qwen_text", splits.roles(1).fitted_on)
    with pytest.raises(InputError, match="no honest validation score.*qwen_text.*--allow-leak"):
        train.main(at(workspace, *QUICK))
    summary = train.main(at(workspace, *QUICK, "--allow-leak"))
    assert "leaked_smape" in summary and "validation_smape" not in summary
    # neither the leaked prices nor those of the model that the run has replaced
    assert not list((workspace.root / "predictions").iterdir())
    left_out = train.main(at(workspace, *QUICK, "--use", "clip_image", "siglip_image", "siglip_text"))
    assert "validation_smape" in left_out  # the leaking encoder is not used


def test_predictions_say_what_was_fitted(workspace, embed):
    """The model's own folds and those of the encoders that it used, and of no other."""
    embed(workspace, "train", "siglip_text", encoder_folds=(3,))
    embed(workspace, "test", "siglip_text", encoder_folds=(3,))
    embed(workspace, "train", "siglip_image", encoder_folds=(0,))
    used = ["--use", "clip_image", "siglip_text"]
    train.main(at(workspace, *QUICK, "--epochs", "1", "--holdout", "2", "--allow-leak", *used))
    predict_test.main(at(workspace))
    meta = read_predictions(workspace, RUN, "test").meta
    own, clip = splits.roles(2).fitted_on, splits.roles(0).fitted_on
    assert meta["stage"] == "fusion.all_embeddings" and meta["model"] == RUN
    assert meta["fitted_on"] == [sorted({*own, *clip, 3})] * splits.N_FOLDS

    train.main(at(workspace, *QUICK, "--epochs", "1", "--use", "siglip_text", "--run", "text"))
    meta = read_predictions(workspace, "text", "train").meta
    assert meta["fitted_on"] == [list(splits.roles(0).fitted_on)] * splits.N_FOLDS


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


def test_test_embeddings_of_another_encoder_are_refused(workspace, embed):
    train.main(at(workspace, *QUICK, "--epochs", "1"))
    embed(workspace, "test", "clip_image", (), checkpoint="another")
    with pytest.raises(InputError, match="clip_image_test.pkl: made by another encoder"):
        predict_test.main(at(workspace))


def test_left_out_embeddings_need_no_file(workspace):
    for split in ("train", "test"):
        for name in ("clip_image", "siglip_image"):
            path = workspace.path("embeddings", name=name, split=split)
            path.unlink()
            sidecar_of(path).unlink()
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


@pytest.mark.slow
def test_resumed_equals_uninterrupted(workspace, killed_at):
    flags = [*QUICK, "--epochs", "6", "--save-epochs", "2", "--dropout", "0.3"]
    whole = train.main(at(workspace, *flags, "--run", "whole"))
    with killed_at(RunFolder, "log", 9):  # in epoch 5: two lines per epoch
        train.main(at(workspace, *flags, "--run", "parts"))
    folder = RunFolder(workspace.path("run", name="parts"))
    assert not folder.complete and len(folder.metrics()) == 8
    parts = train.main(at(workspace, *flags, "--run", "parts", "--resume"))
    assert parts == whole
    assert folder.metrics() == RunFolder(workspace.path("run", name="whole")).metrics()
    prices = [read_predictions(workspace, run, "train").log_price for run in ("whole", "parts")]
    np.testing.assert_array_equal(*prices)
    assert train.main(at(workspace, *flags, "--run", "parts", "--resume")) == parts  # nothing left to do


def test_run_folders_of_older_versions_are_read(workspace, killed_at):
    flags = [*QUICK, "--epochs", "6", "--save-epochs", "2"]
    whole = train.main(at(workspace, *flags))
    before = read_predictions(workspace, RUN, "train").log_price
    path = workspace.path("run", name=RUN) / "settings.json"

    def with_old_names():
        settings = read_json(path)
        settings["clip_norm"] = settings.pop("max_grad_norm")
        settings["checkpoint_epochs"] = settings.pop("save_epochs")
        write_json(path, settings)
        if (path.parent / "COMPLETE").exists():
            (path.parent / "COMPLETE").write_bytes(b"")  # without hashes

    with_old_names()
    assert evaluate_by_groups.main(at(workspace))["validation_smape"] == whole["validation_smape"]
    predict_test.main(at(workspace))
    assert len(read_table(workspace.path("submission"))) == 60

    with killed_at(RunFolder, "log", 9):
        train.main(at(workspace, *flags))
    with_old_names()
    assert train.main(at(workspace, *flags, "--resume")) == whole
    np.testing.assert_array_equal(read_predictions(workspace, RUN, "train").log_price, before)


def test_an_interrupted_run_of_an_older_version_is_refused_in_one_line(workspace, killed_at):
    flags = [*QUICK, "--epochs", "4", "--save-epochs", "1"]
    with killed_at(RunFolder, "log", 3):  # in epoch 2
        train.main(at(workspace, *flags))
    path = workspace.path("run", name=RUN) / "step_00000001" / "state.pt"
    state = torch.load(path, weights_only=True)
    best = state.pop("best")
    state["progress"] = {"epoch": 1, "best_epoch": best["epoch"], "best_smape": best["score"]}
    torch.save(state, path)
    (path.parent / "COMPLETE").write_bytes(b"")
    with pytest.raises(InputError, match="--resume: the checkpoint is of an older version"):
        train.main(at(workspace, *flags, "--resume"))


def test_int8_prices_are_near_those_of_float32(workspace):
    train.main(at(workspace, *QUICK))
    ln_price = {}
    for flag in ("--no-int8", "--int8"):
        predict_test.main(at(workspace, flag))
        ln_price[flag] = np.log(read_predictions(workspace, RUN, "test").price)
    difference = np.abs(ln_price["--int8"] - ln_price["--no-int8"])
    assert 0 < difference.mean() < 0.02 and difference.max() < 0.1
    assert ln_price["--no-int8"].std() > 0.5  # there was something to lose
    with pytest.raises(InputError, match="--int8 --device cuda: int8 weights run on a CPU only"):
        predict_test.main(at(workspace, "--int8", "--device", "cuda"))


def test_int8_prices_do_not_depend_on_the_other_rows(workspace):
    train.main(at(workspace, *QUICK, "--epochs", "2"))
    predict_test.main(at(workspace, "--int8"))
    before = read_predictions(workspace, RUN, "test").by_id
    table = read_table(workspace.path("prepared", split="test"))
    table[::3].to_csv(workspace.path("prepared", split="test"), index=False)
    predict_test.main(at(workspace, "--int8"))
    after = read_predictions(workspace, RUN, "test").by_id
    assert len(after) == 20
    pd.testing.assert_series_equal(before[after.index], after)


def test_final_model_without_validation(workspace):
    summary = train.main(at(workspace, *QUICK, "--epochs", "2", "--holdout", "null"))
    assert "validation_smape" not in summary
    predict_test.main(at(workspace))
    with pytest.raises(InputError, match="--holdout null"):
        evaluate_by_groups.main(at(workspace))


@pytest.mark.slow
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
    model = AllEmbeddings(settings, table.widths)
    target = Target(settings, mean_log_price=2.6, mean_price=20.0)
    rows = torch.arange(60)
    few = predict(model, table, rows, target, batch_size=7)
    torch.testing.assert_close(few, predict(model, table, rows, target, batch_size=60))


def test_no_price_is_below_one_cent(workspace):
    settings = AllEmbeddingsSettings(width=16, heads=2)
    table = load_table(workspace, "test", tuple(WIDTHS))
    model = AllEmbeddings(settings, table.widths)
    model.set_output_bias(-5.0)
    target = Target(settings, mean_log_price=2.6, mean_price=20.0)
    price = predict(model, table, torch.arange(60), target).double().expm1()
    torch.testing.assert_close(price, torch.full((60,), 0.01).double())


def test_summary_and_settings_stand_in_the_run_folder(workspace):
    train.main(at(workspace, *QUICK, "--epochs", "1", "--variant", "tokens", "--report-to", "tensorboard"))
    folder = workspace.path("run", name=RUN)
    assert read_json(folder / "settings.json")["variant"] == "tokens"
    assert read_json(folder / "inputs.json")["widths"] == WIDTHS
    assert list((folder / "tensorboard").glob("events*"))
