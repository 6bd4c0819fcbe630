import json
import re

import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from product_matching import monitor as stage
from product_matching.decision import SCHEMA
from product_matching.monitor import stability_index, wilson_interval
from product_matching.review import review_page


@pytest.fixture
def log(tmp_path):
    """Log of twelve decisions, and the reference of a decision with another distribution."""
    count = 12
    probability = np.linspace(0.05, 0.99, count)
    table = pd.DataFrame(
        {
            "time": 1.0, "run": "r", "left_id": [f"L{i}" for i in range(count)],
            "right_id": [f"R{i}" for i in range(count)], "left": "sony camera", "right": "sony zyxgadget",
            "cosine": 0.5, "probability": probability, "threshold": 0.5, "match": probability >= 0.5,
        }
    )  # fmt: skip
    (tmp_path / "log").mkdir()
    table.to_parquet(tmp_path / "log" / "decisions-1.parquet")
    table.head(1).assign(time=2.0, probability=0.2).to_parquet(tmp_path / "log" / "decisions-2.parquet")
    (tmp_path / "model").mkdir()
    content = {"schema": SCHEMA, "valid_histogram": [100, 0, 0, 0, 0, 0, 0, 0, 0, 10]}
    (tmp_path / "model" / "decision.json").write_text(json.dumps(content))
    (tmp_path / "model" / "vocabulary.json").write_text(json.dumps({"counts": {"sony": 3, "camera": 1}}))
    return tmp_path


def run(folder, *flags):
    return stage.main(
        ["--log", str(folder / "log"), "--model", str(folder / "model"), "--out", str(folder / "out"), *flags]
    )


def test_the_report_counts_drift_and_new_words(log, capsys):
    content = run(log)
    assert content["pairs"] == 12  # the pair that was decided twice counts once
    assert content["score_shift_is_large"] and content["score_shift"] > 0.25
    assert content["share_of_unknown_words"] == pytest.approx(1 / 4)
    assert content["frequent_unknown_words"] == ["zyxgadget"]
    assert "precision_at_confidence" not in content
    assert run(log, "--reference", str(log / "log"))["score_shift"] == 0


def test_precision_is_of_reviewed_pairs_above_the_confidence(log):
    (log / "labels.csv").write_text(
        "left_id,right_id,match,split\nL11,R11,1,train\nL10,R10,0,train\nL3,R3,1,train\n"
    )
    content = run(log, "--reviewed", str(log / "labels.csv"))
    assert (content["reviewed"], content["reviewed_at_confidence"]) == (3, 2)
    assert content["precision_at_confidence"] == 0.5
    low, high = content["precision_interval"]
    assert 0 < low < 0.5 < high < 1


def test_the_page_shows_the_least_sure_pairs_that_nobody_reviewed(log):
    (log / "labels.csv").write_text("left_id,right_id,match\nL5,R5,1\n")
    run(log, "--reviewed", str(log / "labels.csv"), "--pairs", "3")
    page = (log / "out" / "review.html").read_text()
    shown = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])
    assert [pair["left_id"] for pair in shown] == ["L6", "L4", "L7"]


def test_titles_cannot_leave_the_data_of_the_page():
    title = "</script><script>alert(1)</script><!-- PAIRS"
    row = {"left_id": "a", "right_id": "b", "left": title, "right": title, "probability": 0.5}
    page = review_page(pd.DataFrame([row]))
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1]
    assert json.loads(data)[0]["left"] == title


def test_a_damaged_log_and_a_wrong_label_are_named(log):
    (log / "labels.csv").write_text("left_id,right_id,match\nL5,R5,2\n")
    with pytest.raises(InputError, match="labels.csv: match '2' is neither 0 nor 1"):
        run(log, "--reviewed", str(log / "labels.csv"))
    (log / "log" / "decisions-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="decisions-0.parquet: not readable as parquet"):
        run(log)
    with pytest.raises(InputError, match=r"no decisions-\*.parquet there"):
        stage.read_log(log / "model")


def test_intervals_and_stability_by_hand():
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert stability_index(np.array([5, 5]), np.array([50, 50])) == pytest.approx(0, abs=1e-9)
    assert stability_index(np.array([9.5, 0]), np.array([0, 9.5])) == pytest.approx(
        2 * 9.5 / 10.5 * np.log(20)
    )
