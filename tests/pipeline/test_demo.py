"""The demo end to end, a little smaller than `make demo`; every stage is a process of its own."""

import shutil

import numpy as np
import pandas as pd
import pytest

from contracts.catalog import read_table
from contracts.files import read_json
from contracts.workspace import Workspace
from pipeline import demo
from pipeline.report import write_report
from pipeline.scores import write_scores


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
        assert max(texts, images) < score["constant"] - 5
        assert fused > score["best possible"]  # anything below would be a leak


@pytest.mark.slow
def test_validation_predicts_the_score_on_hidden_rows(workspace):
    """The gap between the two scores stays within their sampling error (three standard errors)."""
    scores = pd.read_csv(workspace.path("scores")).set_index("model")
    fused = scores.loc["fusion, all embeddings"]
    test_error = fused["±"] * np.sqrt(fused["rows"] / 300)
    assert abs(fused["test SMAPE"] - fused["validation SMAPE"]) < 3 * np.hypot(fused["±"], test_error)


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
    for text in ("best possible", "Furthest off", "not a picture", "damaged", "peak_mb"):
        assert text in page
    assert page.count("data:image/png") >= 4


@pytest.mark.slow
def test_the_journal_has_the_stages_in_order(workspace):
    stages = [entry["stage"].split()[0] for entry in read_json(workspace.path("stages"))]
    assert stages[0] == "data.prepare"
    assert "fusion.all_embeddings.predict_test" in stages


def test_report_and_scores_of_a_workspace_that_was_only_prepared(sample_workspace, tmp_path):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    assert "constant" in write_scores(tmp_path)
    assert "constant" in write_report(tmp_path).read_text()
