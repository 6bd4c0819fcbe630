"""The commands: train, evaluate, predict, out of fold, resume, several processes."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from contracts.errors import InputError
from text_tabular import evaluate, predict, train
from text_tabular.loop import Training


def probabilities(path):
    table = pd.read_csv(path, dtype={"dialogue_id": str})
    return table.set_index("dialogue_id").filter(like="probability_").sort_index()


def predict_with(finished, run, table, output, *flags):
    predict.main(
        ["--workspace", str(finished), "--run", run, "--input", str(table), "--output", str(output), *flags]
    )
    return probabilities(output)


def test_a_run_leaves_scores_plots_and_predictions(finished, dialogues, tmp_path):
    folder = finished / "checkpoints" / "gate"
    names = {file.name for file in folder.iterdir()}
    plots = {"training_curves.png", "confusion.png", "reliability.png", "text_share.png"}
    assert {"COMPLETE", "scores.json", "model.safetensors", "model.json", *plots} <= names
    scores = json.loads((folder / "scores.json").read_text())
    assert set(scores["text_share"]) == {"buys", "haggles", "leaves"}
    predicted = predict_with(finished, "gate", dialogues / "test.csv", tmp_path / "p.csv")
    assert list(predicted.columns) == ["probability_buys", "probability_haggles", "probability_leaves"]
    np.testing.assert_allclose(predicted.sum(axis=1), 1, atol=1e-5)


def test_a_row_is_predicted_alike_alone_and_in_any_order(finished, dialogues, tmp_path, monkeypatch):
    table = pd.read_csv(dialogues / "test.csv", dtype=str)
    expected = predict_with(finished, "gate", dialogues / "test.csv", tmp_path / "a.csv")
    table.sample(frac=1, random_state=0).to_csv(tmp_path / "shuffled.csv", index=False)
    monkeypatch.setattr(predict, "ROWS_AT_ONCE", 7)
    shuffled = predict_with(finished, "gate", tmp_path / "shuffled.csv", tmp_path / "b.csv")
    pd.testing.assert_frame_equal(shuffled, expected, atol=2e-6)


def test_unknown_categories_missing_fields_and_missing_texts_are_predicted(finished, dialogues, tmp_path):
    table = pd.read_csv(dialogues / "test.csv", dtype=str).head(3)
    table.loc[0, ["messages", "shipping"]] = ["", "by balloon"]
    table.loc[1, table.columns.difference(["dialogue_id", "messages"])] = ""
    table.loc[2, table.columns.difference(["dialogue_id"])] = ""
    table.to_csv(tmp_path / "odd.csv", index=False)
    predicted = predict_with(finished, "gate", tmp_path / "odd.csv", tmp_path / "p.csv")
    assert np.isfinite(predicted.to_numpy()).all()
    table.drop(columns="photos").to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(InputError, match="column photos is missing"):
        predict_with(finished, "gate", tmp_path / "less.csv", tmp_path / "q.csv")
    assert not (tmp_path / "q.csv").exists()


def test_an_output_that_exists_is_kept(finished, dialogues, tmp_path):
    output = tmp_path / "p.csv"
    output.write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        predict_with(finished, "gate", dialogues / "test.csv", output)
    assert output.read_text() == "mine"
    predict_with(finished, "gate", dialogues / "test.csv", output, "--overwrite")


def test_evaluate_repeats_the_scores_of_training(finished):
    before = json.loads((finished / "checkpoints" / "gate" / "scores.json").read_text())
    again = evaluate.main(["--workspace", str(finished), "--run", "gate"])
    assert again["accuracy"] == before["accuracy"]
    assert again["log_loss"] == pytest.approx(before["log_loss"], abs=1e-5)


def test_held_out_labels_change_nothing_but_their_own_score(command, dialogues, tmp_path):
    """The honesty of the score, from the command: other labels of the validation rows leave every weight as it was."""
    table = pd.read_csv(dialogues / "train.csv", dtype=str)
    first = train.main([*command, "--run", "a", "--epochs", "1", "--holdout", "1"])
    folds = json.loads((tmp_path / "checkpoints" / "a" / "folds.json").read_text())
    held_out = table["dialogue_id"].map(folds).isin([2, 3])
    table.loc[held_out, "outcome"] = table.loc[held_out, "outcome"].sample(frac=1, random_state=0).to_numpy()
    changed = tmp_path / "changed.csv"
    table.to_csv(changed, index=False)
    flags = [flag if flag != str(dialogues / "train.csv") else str(changed) for flag in command]
    # the folds follow from the labels, so those of the first run are kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "text_tabular.data.deal_folds", lambda rows, *_: np.array([folds[name] for name in rows.ids])
        )
        second = train.main([*flags, "--run", "b", "--epochs", "1", "--holdout", "1"])
    a, b = (load_file(tmp_path / "checkpoints" / run / "model.safetensors") for run in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
    assert first["log_loss"] != second["log_loss"]


def test_a_resumed_run_equals_an_uninterrupted_one(command, tmp_path, monkeypatch):
    flags = [*command, "--design", "concat", "--epochs", "3"]
    train.main([*flags, "--run", "whole"])
    save = Training.save_checkpoint

    def save_and_stop(self):
        save(self)
        if self.position.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--run", "stopped"])
    monkeypatch.undo()
    train.main([*flags, "--run", "stopped", "--resume"])
    whole, stopped = (
        load_file(tmp_path / "checkpoints" / run / "model.safetensors") for run in ("whole", "stopped")
    )
    for name in whole:
        torch.testing.assert_close(whole[name], stopped[name], rtol=0, atol=0)


def test_out_of_fold_every_row_is_predicted_by_a_model_that_has_not_seen_it(command, tmp_path):
    flags = [*command, "--design", "tabular", "--epochs", "1", "--folds", "2", "--run", "oof"]
    train.main(flags)
    folder = tmp_path / "checkpoints" / "oof"
    rows = pd.read_csv(folder / "out_of_fold.csv")
    assert len(rows) == rows["dialogue_id"].nunique() == 160
    assert sorted(rows["fold"].unique()) == list(range(10))
    assert json.loads((folder / "scores.json").read_text())["rows"] == 160
    assert (folder / "all" / "COMPLETE").is_file()
    changed = (folder / "fold_0" / "model.safetensors").stat().st_mtime_ns
    train.main([*flags, "--resume"])
    assert (folder / "fold_0" / "model.safetensors").stat().st_mtime_ns == changed


@pytest.mark.parametrize("tuning", ["head", "lora"])
def test_less_than_the_whole_encoder_can_be_trained(command, dialogues, tmp_path, tuning):
    train.main([*command, "--epochs", "1", "--tuning", tuning, "--run", tuning])
    predicted = predict_with(tmp_path, tuning, dialogues / "test.csv", tmp_path / "p.csv")
    assert np.isfinite(predicted.to_numpy()).all()
    evaluate.main(["--workspace", str(tmp_path), "--run", tuning])


def test_a_number_is_predicted_in_its_own_units(dialogues, tmp_path, command):
    (tmp_path / "number.yaml").write_text(
        "id: dialogue_id\ntext: messages\nnumeric: [price_ratio, photos]\ntarget: buyer_purchases\ntask: regression\n"
    )
    flags = [flag if not flag.endswith("columns.yaml") else str(tmp_path / "number.yaml") for flag in command]
    scores = train.main([*flags, "--epochs", "2", "--run", "number"])
    assert {"mae", "rmse", "r2"} <= set(scores)
    output = tmp_path / "p.jsonl"
    where = ["--workspace", str(tmp_path), "--run", "number"]
    predict.main([*where, "--input", str(dialogues / "test.csv"), "--output", str(output)])
    predicted = pd.read_json(output, lines=True)["predicted"]
    assert 2 < predicted.mean() < 9  # purchases lie between 0 and 11


def test_rows_without_a_label_are_left_out_on_request(command, dialogues, tmp_path):
    table = pd.read_csv(dialogues / "train.csv", dtype=str)
    table.loc[[3, 5], "outcome"] = ["", "NaN"]
    table.to_csv(tmp_path / "gaps.csv", index=False)
    flags = [flag if flag != str(dialogues / "train.csv") else str(tmp_path / "gaps.csv") for flag in command]
    with pytest.raises(InputError, match="outcome is empty in row a00003, a00005; --skip-unlabelled"):
        train.main(flags)
    train.main([*flags, "--skip-unlabelled", "--design", "tabular", "--epochs", "1", "--run", "some"])
    assert len(json.loads((tmp_path / "checkpoints/some/folds.json").read_text())) == 158


@pytest.mark.parametrize("design", ["gate", "cross_attention"])
def test_a_small_table_can_be_learnt_by_heart(command, tmp_path, design):
    """The gradient reaches every part: fitted rows are predicted far better than text or fields alone allow."""
    fast = ["--epochs", "25", "--patience", "25", "--dropout", "0", "--lr", "2e-3", "--head-lr", "4e-3"]
    train.main([*command, "--design", design, *fast, "--run", "heart"])
    losses = [
        json.loads(line)["train/loss"] for line in (tmp_path / "checkpoints/heart/metrics.jsonl").open()
    ]
    assert losses[-1] < 0.2 < losses[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heads", "7", "--design", "cross_attention"], "heads"),
        (["--dropout", "1"], "--dropout 1"),
        (["--chunk-tokens", "4"], "--chunk-tokens 4"),
        (["--folds", "3"], "--folds 3"),
        (["--design", "tabular", "--fields-as-text"], "--fields-as-text"),
    ],
)
def test_settings_that_cannot_be(command, flags, message):
    with pytest.raises(InputError, match=message):
        train.main([*command, *flags])


def test_tables_that_are_too_small_or_have_no_such_side(command, dialogues, tmp_path):
    small = tmp_path / "small.csv"
    pd.read_csv(dialogues / "train.csv", dtype=str).head(8).to_csv(small, index=False)
    flags = [flag if flag != str(dialogues / "train.csv") else str(small) for flag in command]
    with pytest.raises(InputError, match="at least 10 are needed for folds"):
        train.main(flags)
    (tmp_path / "text.yaml").write_text("text: messages\ntarget: outcome\n")
    flags = [flag if not flag.endswith("columns.yaml") else str(tmp_path / "text.yaml") for flag in command]
    with pytest.raises(InputError, match="neither numeric nor category columns; use --design text"):
        train.main(flags)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [(), ("--fsdp",)])
def test_two_processes_equal_one(command, tmp_path, sharded):
    flags = [*command, "--epochs", "1", "--dropout", "0", "--design", "concat"]
    train.main([*flags, "--batch-size", "16", "--run", "one"])
    ended = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
            "-m", "text_tabular.train", "--", *flags, "--batch-size", "8", "--run", "two", *sharded,
        ],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    one, two = (load_file(tmp_path / "checkpoints" / run / "model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
