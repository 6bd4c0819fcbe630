"""Fusion models of several hold-outs, of all rows, and of several seeds."""

import shutil

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from contracts import splits
from contracts.catalog import read_table
from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.predictions import prediction_names, read_predictions
from contracts.smape import smape
from contracts.workspace import Workspace
from fusion.all_embeddings import evaluate_by_groups, explain, predict, predict_test, train
from fusion.all_embeddings.config import AllEmbeddingsSettings
from fusion.qwen_clip import evaluate_by_groups as pair_evaluate
from fusion.qwen_clip import predict as pair_predict
from fusion.qwen_clip import train as pair_train
from training.run_folder import RunFolder

RUN = AllEmbeddingsSettings.run
QUICK = [
    "--preset", "tiny", "--width", "8", "--heads", "2", "--epochs", "3", "--batch-size", "128", "--device", "cpu",
]  # fmt: skip
WIDTHS = {"clip_image": 5, "siglip_image": 6, "siglip_text": 4, "qwen_text": 7}


@pytest.fixture(scope="module")
def embedded(empty_workspace, write_embedding):
    """Embeddings of frozen encoders that hold the log price under much noise."""
    for name, width in WIDTHS.items():
        for split in ("train", "test"):
            generator = np.random.default_rng(width)
            rows = empty_workspace.prepared(split)
            signal = (
                np.log1p(rows["price"].to_numpy())
                if split == "train"
                else generator.normal(2.6, 1, len(rows))
            )
            matrix = signal[:, None] * generator.normal(size=(1, width)) + generator.normal(
                size=(len(rows), width)
            )
            write_embedding(empty_workspace, split, name, matrix, valid=generator.random(len(rows)) > 0.1)
    return empty_workspace


@pytest.fixture(scope="module")
def out_of_fold(embedded, tmp_path_factory):
    """A workspace with a run of five hold-outs; read only."""
    root = tmp_path_factory.mktemp("out_of_fold")
    shutil.copytree(embedded.root, root, dirs_exist_ok=True)
    train.main(["--workspace", str(root), *QUICK, "--folds", "5"])
    return Workspace(root)


@pytest.fixture
def workspace(embedded, tmp_path):
    shutil.copytree(embedded.root, tmp_path, dirs_exist_ok=True)
    return Workspace(tmp_path)


def at(workspace, *flags):
    return ["--workspace", str(workspace.root), *flags]


def run_folder(workspace, name=RUN):
    return RunFolder(workspace.path("run", name=name))


def weights(workspace, run):
    return load_file(run_folder(workspace, run).path / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def change_price(workspace, position, factor):
    """Returns the sample_id of the row whose price was changed."""
    path = workspace.path("prepared", split="train")
    table = read_table(path)
    table.loc[position, "price"] = str(float(table.loc[position, "price"]) * factor)
    table.to_csv(path, index=False)
    return table.loc[position, "sample_id"]


def test_every_row_is_priced_by_a_model_that_has_not_seen_it(out_of_fold):
    table = out_of_fold.training_table()
    priced = read_predictions(out_of_fold, RUN, "train")
    assert priced.sample_ids.tolist() == table["sample_id"].tolist()
    priced.require_unseen()
    assert priced.meta["stage"] == "fusion.all_embeddings" and priced.meta["model"] == RUN
    assert priced.meta["fitted_on"] == splits.fitted_out_of_fold(5)
    summary = read_json(run_folder(out_of_fold).path / "summary.json")
    assert summary["validation_smape"] == pytest.approx(smape(table["price"], priced.price), abs=0.001)
    assert summary["rows"] == 400 and run_folder(out_of_fold).complete
    assert prediction_names(out_of_fold) == [RUN]  # the parts have no prices of their own


def test_the_model_of_a_fold_is_that_of_a_single_hold_out(out_of_fold, workspace):
    single = train.main(at(workspace, *QUICK, "--holdout", "3"))
    assert_same_weights(weights(out_of_fold, f"{RUN}/fold_3"), weights(workspace, RUN))
    of_fold = read_json(run_folder(out_of_fold, f"{RUN}/fold_3").path / "summary.json")
    assert of_fold == single
    alone = read_predictions(workspace, RUN, "train").by_id
    together = read_predictions(out_of_fold, RUN, "train").by_id
    pd.testing.assert_series_equal(alone, together[alone.index])


def test_a_price_has_no_influence_on_the_models_that_have_not_seen_it(workspace):
    flags = at(workspace, *QUICK, "--folds", "2")
    train.main(flags)
    before = read_predictions(workspace, RUN, "train")
    position = int(np.flatnonzero(before.fold == 2)[0])  # the other model fits this fold
    change_price(workspace, position, 7)
    train.main(flags)
    after = read_predictions(workspace, RUN, "train")
    same = before.log_price == after.log_price
    np.testing.assert_array_equal(same, before.fold < 5)


def test_the_model_of_all_rows_follows_the_median_of_the_hold_outs(workspace):
    train.main(at(workspace, *QUICK, "--epochs", "12", "--lr", "0.02", "--lr-patience", "0", "--folds", "5"))
    runs = [run_folder(workspace, f"{RUN}/fold_{holdout}") for holdout in range(5)]
    best = [read_json(run.path / "summary.json")["best_epoch"] for run in runs]
    middle = sorted(range(5), key=lambda holdout: best[holdout])[2]
    expected = [line["lr"] for line in runs[middle].metrics() if "lr" in line][: best[middle]]
    whole = run_folder(workspace, f"{RUN}/all")
    assert [line["lr"] for line in whole.metrics()] == expected
    assert min(expected) < 0.02  # there was something to follow
    assert not any("stop/smape" in line for line in whole.metrics())


def test_refit_sees_all_rows_and_validation_does_not(workspace):
    flags = at(workspace, *QUICK, "--refit")
    train.main(flags)
    validated, refitted = weights(workspace, RUN), weights(workspace, f"{RUN}/all")
    prices = np.log1p(workspace.prepared("train")["price"])
    inputs = read_json(run_folder(workspace, f"{RUN}/all").path / "inputs.json")
    assert inputs["mean_log_price"] == pytest.approx(prices.mean(), rel=1e-5)
    best_epoch = read_json(run_folder(workspace).path / "summary.json")["best_epoch"]
    assert read_json(run_folder(workspace, f"{RUN}/all").path / "summary.json")["epochs"] == best_epoch
    assert read_predictions(workspace, RUN, "train").meta["fitted_on"][0] == list(splits.roles(0).fitted_on)

    fold = workspace.training_table()["fold"].to_numpy()
    changed = int(np.flatnonzero(fold == splits.roles(0).validate[0])[0])
    change_price(workspace, changed, 7)
    train.main(flags)
    assert_same_weights(weights(workspace, RUN), validated)
    with pytest.raises(AssertionError):
        assert_same_weights(weights(workspace, f"{RUN}/all"), refitted)


def test_other_tables_are_priced_by_the_model_of_all_rows(out_of_fold, tmp_path):
    shutil.copytree(out_of_fold.root, tmp_path, dirs_exist_ok=True)
    workspace = Workspace(tmp_path)
    predict.main(["test", *at(workspace)])
    priced = read_predictions(workspace, RUN, "test")
    assert priced.meta["fitted_on"] == [list(range(10))] * 10 and priced.meta["model"] == RUN
    assert not workspace.path("submission").exists()  # that is for predict_test
    predict.main(["test", *at(workspace, "--run", f"{RUN}/all")])
    of_all = read_predictions(workspace, f"{RUN}/all", "test")
    np.testing.assert_array_equal(priced.log_price, of_all.log_price)
    predict_test.main(at(workspace))
    submission = read_table(workspace.path("submission"))["price"].astype(float)
    np.testing.assert_allclose(submission, priced.price, atol=1e-4)
    with pytest.raises(InputError, match="train: the model was fitted on these rows"):
        predict.main(["train", *at(workspace)])
    with pytest.raises(InputError, match="prepared_new.csv: no prepared table"):
        predict.main(["new", *at(workspace)])


def test_the_order_of_a_table_changes_no_price(out_of_fold, tmp_path):
    shutil.copytree(out_of_fold.root, tmp_path, dirs_exist_ok=True)
    workspace = Workspace(tmp_path)
    predict.main(["test", *at(workspace)])
    before = read_predictions(workspace, RUN, "test").by_id
    path = workspace.path("prepared", split="test")
    read_table(path)[::-1].to_csv(path, index=False)
    predict.main(["test", *at(workspace)])
    after = read_predictions(workspace, RUN, "test").by_id
    assert after.index.tolist() == before.index.tolist()[::-1]
    pd.testing.assert_series_equal(after[before.index], before, rtol=1e-6)


def test_seeds_are_averaged_in_ln_price(workspace):
    train.main(at(workspace, *QUICK, "--seeds", "2", "--seed", "4"))
    predict_test.main(at(workspace))
    for seed in ("4", "5"):
        train.main(at(workspace, *QUICK, "--run", f"alone_{seed}", "--seed", seed))
        predict_test.main(at(workspace, "--run", f"alone_{seed}"))
    for split in ("train", "test"):
        averaged = np.log(read_predictions(workspace, RUN, split).price)
        alone = [np.log(read_predictions(workspace, f"alone_{seed}", split).price) for seed in ("4", "5")]
        assert np.abs(alone[0] - alone[1]).max() > 0.01
        np.testing.assert_allclose(averaged, np.mean(alone, axis=0), atol=2e-6)


def test_seeds_average_whatever_the_target_means(workspace):
    flags = at(workspace, *QUICK, "--target", "price")
    train.main([*flags, "--seeds", "2"])
    averaged = np.log(read_predictions(workspace, RUN, "train").price)
    alone = []
    for seed in ("0", "1"):
        train.main([*flags, "--seed", seed, "--run", "alone"])
        alone.append(np.log(read_predictions(workspace, "alone", "train").price))
    np.testing.assert_allclose(averaged, np.mean(alone, axis=0), atol=2e-5)


def test_seeds_out_of_fold_and_int8(workspace):
    train.main(at(workspace, *QUICK, "--folds", "2", "--seeds", "2"))
    folder = run_folder(workspace).path
    for part in ("fold_0", "fold_1", "all"):
        assert (folder / part / "seed_0" / "model.safetensors").is_file()
        assert (folder / part / "seed_1" / "model.safetensors").is_file()
        assert (folder / part / "COMPLETE").is_file()
    read_predictions(workspace, RUN, "train").require_unseen()
    predict.main(["test", *at(workspace)])
    exact = np.log(read_predictions(workspace, RUN, "test").price)
    predict.main(["test", *at(workspace, "--int8")])
    assert 0 < np.abs(np.log(read_predictions(workspace, RUN, "test").price) - exact).max() < 0.1


def test_an_encoder_of_a_single_hold_out_is_refused_out_of_fold(workspace, write_embedding):
    matrix = np.ones((400, 4))
    write_embedding(workspace, "train", "siglip_text", matrix, encoder_folds=splits.roles(0).fitted_on)
    with pytest.raises(InputError, match="siglip_text.*was fitted on rows.*train the encoder with --folds"):
        train.main(at(workspace, *QUICK, "--folds", "5"))
    summary = train.main(at(workspace, *QUICK, "--folds", "2", "--allow-leak"))
    assert "leaked_smape" in summary and prediction_names(workspace) == []


def test_out_of_fold_embeddings_are_honest(workspace, write_embedding):
    matrix = np.random.default_rng(0).normal(size=(400, 4))
    write_embedding(workspace, "train", "siglip_text", matrix, fitted_on=splits.fitted_out_of_fold(5))
    summary = train.main(at(workspace, *QUICK, "--folds", "5", "--epochs", "1"))
    assert summary["rows"] == 400


@pytest.mark.parametrize(("call", "finished"), [(12, ["fold_0"]), (18, ["fold_0", "fold_1"])])
def test_an_interrupted_run_goes_on_where_it_stopped(workspace, killed_at, call, finished):
    """With four epochs, each hold-out logs eight lines and the model of all rows four."""
    flags = [*QUICK, "--epochs", "4", "--folds", "2", "--save-epochs", "1", "--patience", "9"]
    whole = train.main(at(workspace, *flags, "--run", "whole"))
    with killed_at(RunFolder, "log", call):
        train.main(at(workspace, *flags, "--run", "parts"))
    parts = ("fold_0", "fold_1", "all")
    assert [part for part in parts if run_folder(workspace, f"parts/{part}").complete] == finished
    models = {part: run_folder(workspace, f"parts/{part}").path / "model.safetensors" for part in finished}
    written = {part: path.stat().st_mtime_ns for part, path in models.items()}
    again = train.main(at(workspace, *flags, "--run", "parts", "--resume"))
    assert {part: path.stat().st_mtime_ns for part, path in models.items()} == written  # not trained again
    assert {**again, "parts": None} == {**whole, "parts": None}
    for part in parts:
        assert_same_weights(weights(workspace, f"parts/{part}"), weights(workspace, f"whole/{part}"))
        assert (
            run_folder(workspace, f"parts/{part}").metrics()
            == run_folder(workspace, f"whole/{part}").metrics()
        )
    prices = [read_predictions(workspace, run, "train").log_price for run in ("whole", "parts")]
    np.testing.assert_array_equal(*prices)


@pytest.mark.parametrize(
    ("flags", "setting"), [(["--lr", "0.1"], "lr"), (["--seeds", "2"], "seeds"), (["--refit"], "refit")]
)
def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(workspace, flags, setting):
    train.main(at(workspace, *QUICK, "--epochs", "1"))
    assert train.main(at(workspace, *QUICK, "--epochs", "1", "--resume"))["rows"] > 0
    with pytest.raises(InputError, match=f"--resume: {setting} was") as refused:
        train.main(at(workspace, *QUICK, "--epochs", "1", "--resume", *flags))
    assert "\n" not in str(refused.value)


def test_evaluation_and_explanation_of_an_out_of_fold_run(out_of_fold, tmp_path):
    shutil.copytree(out_of_fold.root, tmp_path, dirs_exist_ok=True)
    workspace = Workspace(tmp_path)
    summary = read_json(run_folder(workspace).path / "summary.json")
    assert evaluate_by_groups.main(at(workspace))["validation_smape"] == summary["validation_smape"]
    with pytest.raises(InputError, match="one model per hold-out; choose one, such as --run .*/fold_0"):
        explain.main(at(workspace, "--products", "1"))
    explain.main(at(workspace, "--products", "1", "--repeats", "1", "--run", f"{RUN}/fold_0"))
    assert (run_folder(workspace, f"{RUN}/fold_0").path / "explanation" / "importance.csv").is_file()


def test_the_pair_has_the_same_protocol(workspace):
    flags = [
        "--preset",
        "tiny",
        "--hidden",
        "8",
        "--heads",
        "2",
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--folds",
        "2",
    ]
    summary = pair_train.main(at(workspace, *flags))
    assert summary["rows"] == 400
    assert pair_evaluate.main(at(workspace))["validation_smape"] == summary["validation_smape"]
    pair_predict.main(["test", *at(workspace)])
    priced = read_predictions(workspace, "fusion_qwen_clip", "test")
    assert len(priced.price) == 60 and priced.meta["stage"] == "fusion.qwen_clip"
    with pytest.raises(InputError, match="--use tabular: choose from clip_image, qwen_text"):
        pair_train.main(at(workspace, *flags, "--use", "tabular"))


def test_a_run_from_before_out_of_fold_runs_is_read(workspace):
    summary = train.main(at(workspace, *QUICK))
    predict.main(["test", *at(workspace)])
    before = read_predictions(workspace, RUN, "test").log_price
    folder = run_folder(workspace).path
    settings = read_json(folder / "settings.json")
    for name in ("folds", "refit", "seeds"):
        del settings[name]
    write_json(folder / "settings.json", settings)
    inputs = read_json(folder / "inputs.json")
    del inputs["outcome"]
    write_json(folder / "inputs.json", inputs)
    (folder / "COMPLETE").write_bytes(b"")  # without hashes
    assert evaluate_by_groups.main(at(workspace))["validation_smape"] == summary["validation_smape"]
    predict.main(["test", *at(workspace)])
    np.testing.assert_array_equal(read_predictions(workspace, RUN, "test").log_price, before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--folds", "3"], "--folds 3: ten folds are dealt into 2, 5 or 10"),
        (["--seeds", "0"], "--seeds 0: must be above 0"),
        (["--refit", "--holdout", "null"], "--refit --holdout null"),
        (["--holdout", "5"], "--holdout 5"),
    ],
)
def test_settings_that_make_no_sense(workspace, flags, message):
    with pytest.raises(InputError, match=message):
        train.main(at(workspace, *QUICK, *flags))
