"""The demo end to end, a little smaller than `make demo`; every stage is a process of its own."""

import shutil

import numpy as np
import pandas as pd
import pytest

from contracts.catalog import read_table
from contracts.files import read_json
from contracts.predictions import read_predictions
from contracts.workspace import Workspace
from ensemble.saved import Ensemble
from pipeline import demo
from pipeline.report import write_report
from pipeline.scores import write_scores
from pricing import PriceModel


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.main(["--workspace", str(folder), "--train-rows", "1200", "--test-rows", "300"])
    return Workspace(folder)


@pytest.mark.slow
def test_fused_beats_either_side_and_nothing_beats_the_best_possible(workspace):
    scores = pd.read_csv(workspace.path("scores")).set_index("model")
    for column in ("validation SMAPE", "test SMAPE"):
        score = scores[column]
        fused = score["fusion, all embeddings"]
        texts = score["fusion, texts only"]
        images = score["fusion, images only"]
        assert fused < min(texts, images) - 5
        # the ensemble has fusion as a member, and weights that were fitted on few rows
        assert score["ensemble"] < fused + 1
        # there is a line of the constant for each set of folds that a model is scored on
        assert max(texts, images) < score["constant"].min() - 5
        assert fused > score["best possible"]  # anything below would be a leak


@pytest.mark.slow
def test_validation_predicts_the_score_on_hidden_rows(workspace):
    """The gap between the two scores stays within their sampling error (three standard errors)."""
    scores = pd.read_csv(workspace.path("scores")).set_index("model")
    for model in ("fusion, all embeddings", "ensemble"):
        score = scores.loc[model]
        test_error = score["±"] * np.sqrt(score["rows"] / 300)
        assert abs(score["test SMAPE"] - score["validation SMAPE"]) < 3 * np.hypot(score["±"], test_error)


@pytest.mark.slow
def test_submission_has_every_row_of_test_csv(workspace):
    submission = read_table(workspace.path("submission"))
    asked = read_table(workspace.root / "catalogue" / "test.csv")
    assert submission["sample_id"].tolist() == asked["sample_id"].tolist()
    price = submission["price"].astype(float)
    assert np.isfinite(price).all()
    assert (price > 0).all()


@pytest.mark.slow
def test_report_is_one_self_contained_page_and_names_the_broken_pictures(workspace):
    page = workspace.path("report").read_text()
    assert "http" not in page.replace("http-equiv", "")
    for text in ("best possible", "Furthest off", "not a picture", "damaged", "peak memory"):
        assert text in page
    assert page.count("<svg") >= 4
    assert "data:image/jpeg" in page


@pytest.mark.slow
def test_the_journal_has_the_stages_in_order(workspace):
    stages = [entry["stage"].split()[0] for entry in read_json(workspace.path("stages"))]
    assert stages[0] == "data.prepare"
    assert "fusion.all_embeddings.predict" in stages
    assert "ensemble.train" in stages


@pytest.mark.slow
def test_the_submission_and_its_score_are_those_of_the_ensemble_that_is_saved(workspace):
    saved = Ensemble.load(workspace.path("run", name="ensemble"))
    names = [member.name for member in saved.members]
    assert names == ["fusion_all_embeddings", "words_ridge", "words_mlp"]
    submission = read_table(workspace.path("submission"))
    ln_prices = [
        np.log(read_predictions(workspace, name, "test").by_id[submission["sample_id"]]) for name in names
    ]
    expected = np.exp(np.array(saved.weights) @ np.stack(ln_prices))
    np.testing.assert_allclose(submission["price"].astype(float), expected, rtol=2e-4)

    score = pd.read_csv(workspace.path("scores")).set_index("model").loc["ensemble"]
    assert score["validation SMAPE"] == pytest.approx(saved.score["smape"], abs=0.006)
    assert score["rows"] == saved.score["rows"]
    intervals = read_table(workspace.path("intervals"))
    assert intervals["sample_id"].tolist() == submission["sample_id"].tolist()


@pytest.mark.slow
def test_the_saved_model_gives_the_prices_of_the_submission(workspace):
    model = PriceModel.load(workspace.root)
    asked = read_table(workspace.root / "catalogue" / "test.csv").head(40)
    prices = model.predict(asked)
    submission = read_table(workspace.path("submission")).set_index("sample_id")
    expected = submission.loc[prices["sample_id"], "price"].astype(float).to_numpy()
    # an encoder rounds otherwise in batches of another size
    np.testing.assert_allclose(prices["price"], expected, rtol=1e-3)


def test_report_and_scores_of_a_workspace_that_was_only_prepared(sample_workspace, tmp_path):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    assert "constant" in write_scores(tmp_path)
    assert "constant" in write_report(tmp_path).read_text()
