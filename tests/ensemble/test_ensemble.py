import shutil

import numpy as np
import pandas as pd
import pytest

from contracts.catalog import read_table
from contracts.errors import InputError
from contracts.files import read_json, sidecar_of, write_json
from contracts.predictions import read_predictions, write_predictions
from contracts.smape import smape
from contracts.splits import fitted_on, fitted_out_of_fold, roles
from contracts.workspace import Workspace
from ensemble import predict, train
from ensemble.saved import Ensemble
from ensemble.weights import fit_weights, interval_half_width


@pytest.fixture
def workspace(sample_workspace, tmp_path):
    """Three models: two good ones with independent errors, and noise."""
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    workspace, generator = Workspace(tmp_path), np.random.default_rng(0)
    for split in ("train", "test"):
        table = workspace.prepared(split)
        ln_price = np.log(table["price"]) if split == "train" else generator.normal(2.5, 1, len(table))
        for name, error in (("a", 0.4), ("b", 0.4), ("noise", 3.0)):
            predicted = ln_price + generator.normal(0, error, len(table))
            write(workspace, name, split, table["sample_id"], predicted)
    return workspace


def write(workspace, name, split, ids, ln_predicted, seen=None):
    """Predictions of a model that is out of fold, or was fitted on what `seen` says."""
    meta = {"stage": "test", "model": name, "fitted_on": seen or fitted_out_of_fold(5)}
    log_price = np.log1p(np.exp(np.asarray(ln_predicted)))
    return write_predictions(workspace, name, split, np.asarray(ids), log_price, meta=meta)


def test_weights_find_the_mean_of_two_independent_models():
    generator = np.random.default_rng(1)
    ln_price = generator.normal(2.5, 1, 4000)
    predicted = ln_price[:, None] + generator.normal(0, [0.4, 0.4, 3.0], (4000, 3))
    weights = fit_weights(predicted, ln_price)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0.0], atol=0.06)
    best = smape(np.exp(ln_price), np.exp(predicted @ weights))
    grid = [(x, 1 - x - z, z) for x in np.linspace(0, 1, 21) for z in (0, 0.05, 0.1) if x + z <= 1]
    assert best <= min(smape(np.exp(ln_price), np.exp(predicted @ np.array(w))) for w in grid) + 0.02


def test_intervals_cover_new_rows_as_often_as_they_say():
    generator = np.random.default_rng(2)
    covered = []
    for _ in range(200):
        error, new = generator.standard_t(3, (2, 300))
        factor = interval_half_width(error, np.ones(300), 0.8)
        covered.append(np.mean(np.abs(new) <= factor))
    assert 0.79 < np.mean(covered) < 0.82
    assert interval_half_width(np.ones(3), np.ones(3), 0.95) == np.inf  # too few rows to promise 95 %


def test_ensemble_beats_its_members_and_writes_every_test_row(workspace):
    summary = train.main(["--workspace", str(workspace.root)])
    members = {line["model"]: line for line in summary["members"]}
    assert set(members) == {"a", "b", "noise"}
    assert summary["smape"] < min(members["a"]["smape_alone"], members["b"]["smape_alone"]) - 3
    assert members["noise"]["weight"] < 0.05
    assert members["a"]["smape_without_it"] > summary["smape"] + 3
    assert summary["coverage"]["80%"] == pytest.approx(0.8, abs=0.06)
    assert summary["coverage"]["95%"] == pytest.approx(0.95, abs=0.03)

    submission = read_table(workspace.path("submission"))
    assert list(submission.columns) == ["sample_id", "price"]
    assert submission["sample_id"].tolist() == workspace.prepared("test")["sample_id"].tolist()
    intervals = pd.read_csv(workspace.root / "test_intervals.csv")
    ordered = intervals[["low_95%", "low_80%", "price", "high_80%", "high_95%"]].to_numpy()
    assert (np.diff(ordered, axis=1) > 0).all()
    stored = read_json(workspace.path("run", name="ensemble") / "summary.json")
    assert stored["smape"] == pytest.approx(summary["smape"])


def test_a_model_that_lacks_rows_is_left_out_or_refused_by_name(workspace):
    rows = workspace.prepared("train").head(100)
    write(workspace, "b", "train", rows["sample_id"], np.log(rows["price"]))
    summary = train.main(["--workspace", str(workspace.root)])
    assert {line["model"] for line in summary["members"]} == {"a", "noise"}
    with pytest.raises(InputError, match="b_train.csv: no prediction for 300 rows.*not out of fold"):
        train.main(["--workspace", str(workspace.root), "--members", "a", "b"])


def test_no_member_at_all(workspace):
    shutil.rmtree(workspace.root / "predictions")
    with pytest.raises(InputError, match="no model has predicted all rows out of fold"):
        train.main(["--workspace", str(workspace.root)])


def cheat(workspace, name="cheat", **how):
    """A model that knows the price of every training row."""
    rows = workspace.prepared("train")
    write(workspace, name, "train", rows["sample_id"], np.log(rows["price"]) + 0.01, **how)
    tests = workspace.prepared("test")
    write(workspace, name, "test", tests["sample_id"], np.full(len(tests), 2.5), **how)


def test_a_member_that_has_seen_its_rows_is_refused_or_left_out(workspace, capsys):
    cheat(workspace, seen=fitted_on(encoder_folds=tuple(range(10))))
    arguments = ["--workspace", str(workspace.root)]
    with pytest.raises(InputError, match="cheat_train.csv: no honest score"):
        train.main([*arguments, "--members", "a", "cheat"])
    summary = train.main(arguments)
    assert "left out" in capsys.readouterr().out
    assert {line["model"] for line in summary["members"]} == {"a", "b", "noise"}
    assert summary["smape"] > 20


def test_a_leaked_score_is_called_leaked_here_and_in_what_reads_it(workspace, capsys):
    cheat(workspace, seen=fitted_on(encoder_folds=(0, 1, 2)))
    summary = train.main(["--workspace", str(workspace.root), "--members", "a", "cheat", "--allow-leak"])
    assert "smape" not in summary and summary["leaked_smape"] < 5
    assert "leaked SMAPE" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"folds \[0, 1, 2\]"):
        read_predictions(workspace, "ensemble", "train").require_unseen()


def test_a_member_of_unknown_origin_is_refused(workspace):
    cheat(workspace)
    sidecar_of(workspace.path("predictions", name="cheat", split="train")).unlink()
    with pytest.raises(InputError, match="says what its model was fitted on"):
        train.main(["--workspace", str(workspace.root), "--members", "a", "cheat"])
    assert not workspace.path("submission").exists()


def test_a_row_without_a_fold_ends_in_one_line(workspace):
    folds = workspace.path("folds")
    header, first, *rest = folds.read_text().splitlines()
    folds.write_text("\n".join([header, *rest]) + "\n")
    with pytest.raises(InputError, match=f"no fold for sample_id {first.split(',')[0]}"):
        train.main(["--workspace", str(workspace.root)])
    assert not workspace.path("submission").exists()


def test_a_kept_ensemble_prices_test_as_training_did_and_any_other_table(workspace):
    arguments = ["--workspace", str(workspace.root)]
    train.main(arguments)
    submission = workspace.path("submission").read_bytes()
    intervals = (workspace.root / "test_intervals.csv").read_bytes()
    workspace.path("submission").unlink()
    predict.main(["test", *arguments])
    assert workspace.path("submission").read_bytes() == submission
    assert (workspace.root / "test_intervals.csv").read_bytes() == intervals

    new = workspace.prepared("test").head(7).assign(sample_id=[f"new{row}" for row in range(7)])
    new.to_csv(workspace.path("prepared", split="new"), index=False)
    with pytest.raises(InputError, match="a_new.csv: no such file"):
        predict.main(["new", *arguments])
    for name in ("a", "b", "noise"):
        write(workspace, name, "new", new["sample_id"], np.linspace(1, 4, 7))
    predict.main(["new", *arguments])
    prices = read_table(workspace.root / "new_out.csv")
    assert prices["sample_id"].tolist() == new["sample_id"].tolist()
    np.testing.assert_allclose(np.log(prices["price"].astype(float)), np.linspace(1, 4, 7), atol=1e-3)


def test_a_line_that_the_input_has_twice_is_priced_twice(workspace):
    ids = workspace.prepared("test")["sample_id"].tolist()
    lines = [*ids, ids[3], ids[0]]
    pd.DataFrame({"sample_id": lines}).to_csv(workspace.path("input_ids", split="test"), index=False)
    train.main(["--workspace", str(workspace.root)])
    for artefact in ("submission", "intervals"):
        written = read_table(workspace.path(artefact))
        assert written["sample_id"].tolist() == lines
        assert written["price"].iloc[-1] == written["price"].iloc[0]


def test_no_test_table_leaves_an_ensemble_and_its_score(workspace):
    workspace.path("prepared", split="test").unlink()
    summary = train.main(["--workspace", str(workspace.root), "--members", "a", "b"])
    assert 0 < summary["smape"] < 50
    assert not workspace.path("submission").exists()
    assert len(Ensemble.load(workspace.path("run", name="ensemble")).members) == 2


def test_an_ensemble_that_is_absent_or_of_another_version_is_one_line(workspace):
    with pytest.raises(InputError, match="no fitted ensemble; run python -m ensemble.train"):
        predict.main(["test", "--workspace", str(workspace.root)])
    train.main(["--workspace", str(workspace.root)])
    path = workspace.path("run", name="ensemble") / "model.json"
    write_json(path, read_json(path) | {"schema": 99})
    with pytest.raises(InputError, match="model.json: schema 99"):
        predict.main(["test", "--workspace", str(workspace.root)])


@pytest.fixture
def rows():
    """ln predictions of two members, ln prices and folds of 400 rows; the second member errs in hold-out 2 alone."""
    generator = np.random.default_rng(3)
    ln_price = generator.normal(2.5, 1, 400)
    fold = np.arange(400) % 10
    errors = generator.normal(0, [0.4, 0.4], (400, 2))
    errors[np.isin(fold, roles(2).validate), 1] += 3
    return ln_price[:, None] + errors, ln_price, fold


def test_the_weights_of_a_hold_out_know_nothing_of_its_prices(rows):
    """Its prices times seven: what the ensemble says of its rows stays, what it says of others moves."""
    ln_predicted, ln_price, fold = rows
    asked = np.isin(fold, roles(2).validate)
    before = train.nested_predictions(ln_predicted, ln_price, fold)
    after = train.nested_predictions(ln_predicted, ln_price + np.log(7) * asked, fold)
    np.testing.assert_array_equal(after[asked], before[asked])
    assert np.abs(after[~asked] - before[~asked]).max() > 0.01


def test_the_intervals_of_a_hold_out_know_nothing_of_its_errors(rows):
    ln_predicted, ln_price, fold = rows
    ln_error = ln_predicted[:, 1] - ln_price
    difficulty = np.linspace(0.5, 1.5, len(fold))
    inside = train.inside_nested_intervals(ln_error, difficulty, fold, 0.8)
    asked = np.isin(fold, roles(2).validate)
    factor = interval_half_width(ln_error[~asked], difficulty[~asked], 0.8)
    np.testing.assert_array_equal(inside[asked], np.abs(ln_error[asked]) <= factor * difficulty[asked])
    # calibrated on their own errors of 3, these intervals would hold nearly all of these rows
    assert inside[asked].mean() < 0.1


@pytest.fixture
def one_holdout(workspace):
    """A model of hold-out 0 beside the three out-of-fold ones: it has priced folds 0 and 1 only, and well."""
    holdout_predictions(workspace, "encoder", (0, 1))
    return workspace


def holdout_predictions(workspace, name, folds, error=0.2):
    rows = workspace.training_table()
    rows = rows[rows["fold"].isin(folds)]
    seen = fitted_on(encoder_folds=tuple(fold for fold in range(10) if fold not in folds))
    noise = np.random.default_rng(5).normal(0, error, len(rows))
    write(workspace, name, "train", rows["sample_id"], np.log(rows["price"]) + noise, seen=seen)
    tests = workspace.prepared("test")
    write(workspace, name, "test", tests["sample_id"], np.full(len(tests), 2.0), seen=seen)


def test_members_of_one_hold_out_are_weighed_and_scored_on_its_rows(one_holdout):
    summary = train.main(["--workspace", str(one_holdout.root), "--members", "a", "encoder"])
    rows = one_holdout.training_table().set_index("sample_id")
    held_out = rows[rows["fold"].isin([0, 1])]
    assert summary["rows"] == len(held_out)
    by_name = {line["model"]: line for line in summary["members"]}
    assert by_name["encoder"]["weight"] > 0.6

    # each fold by the weights of the other, by hand
    ln_predicted = np.stack(
        [
            np.log(read_predictions(one_holdout, name, "train").by_id[held_out.index])
            for name in ("a", "encoder")
        ],
        axis=1,
    )
    ln_price, fold = np.log(held_out["price"].to_numpy()), held_out["fold"].to_numpy()
    expected = np.empty(len(held_out))
    for own, other in ((0, 1), (1, 0)):
        weights = fit_weights(ln_predicted[fold == other], ln_price[fold == other])
        expected[fold == own] = ln_predicted[fold == own] @ weights
    assert summary["smape"] == pytest.approx(smape(np.exp(ln_price), np.exp(expected)))
    kept = Ensemble.load(one_holdout.path("run", name="ensemble"))
    np.testing.assert_allclose(kept.weights, fit_weights(ln_predicted, ln_price))


def test_prices_of_one_hold_out_say_that_the_weights_saw_its_other_fold(one_holdout):
    train.main(["--workspace", str(one_holdout.root), "--members", "a", "encoder"])
    predictions = read_predictions(one_holdout, "ensemble", "train")
    predictions.require_unseen()
    assert set(predictions.fold) == {0, 1}
    assert predictions.meta["fitted_on"][0] == list(range(1, 10))
    assert predictions.meta["fitted_on"][1] == [0, *range(2, 10)]
    submission = read_table(one_holdout.path("submission"))
    assert len(submission) == len(one_holdout.prepared("test"))


def test_the_weights_of_a_fold_know_nothing_of_its_prices(rows):
    ln_predicted, ln_price, fold = rows
    held_out = np.isin(fold, roles(2).validate)
    ln_predicted, ln_price, fold = ln_predicted[held_out], ln_price[held_out], fold[held_out]
    asked = fold == 4
    before = train.nested_predictions(ln_predicted, ln_price, fold)
    after = train.nested_predictions(ln_predicted, ln_price + np.log(7) * asked, fold)
    np.testing.assert_array_equal(after[asked], before[asked])
    assert np.abs(after[~asked] - before[~asked]).max() > 0.01


def test_members_without_two_common_folds_are_refused_by_name(one_holdout):
    arguments = ["--workspace", str(one_holdout.root), "--members"]
    holdout_predictions(one_holdout, "other", (2, 3))
    with pytest.raises(
        InputError, match="encoder folds 0 1; other folds 2 3; train them out of fold or on the same"
    ):
        train.main([*arguments, "encoder", "other"])
    holdout_predictions(one_holdout, "single", (1,))
    with pytest.raises(InputError, match="need two folds.*a all folds; single folds 1"):
        train.main([*arguments, "a", "single"])


def test_a_model_of_one_hold_out_is_no_member_unless_it_is_named(one_holdout, capsys):
    summary = train.main(["--workspace", str(one_holdout.root)])
    assert "encoder" not in {line["model"] for line in summary["members"]}
    assert (
        "left out: encoder has not priced every row of train; --members can name it"
        in capsys.readouterr().out
    )
    assert summary["rows"] == 400


def test_the_score_stands_where_the_prices_are_announced(workspace, capsys):
    summary = train.main(["--workspace", str(workspace.root), "--members", "a", "b"])
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "test_out.csv: 60 prices" in printed
    assert f"expect a SMAPE of {summary['smape']:.2f} ± {summary['standard_error']:.2f}" in printed


def test_an_interval_is_as_wide_as_its_members_disagree():
    ensemble = Ensemble((), (0.5, 0.5), {0.8: 2.0}, {})
    prices = ensemble.prices(np.array(["agree", "differ"]), np.array([[3.0, 3.0], [2.0, 4.0]]))
    np.testing.assert_allclose(np.log(prices["price"]), [3, 3], atol=1e-4)
    # half-width: factor · (0.3 + standard deviation of the members)
    np.testing.assert_allclose(np.log(prices["high_80%"]), [3 + 2 * 0.3, 3 + 2 * 1.3], atol=1e-3)
    np.testing.assert_allclose(np.log(prices["low_80%"]), [3 - 2 * 0.3, 3 - 2 * 1.3], atol=1e-3)
