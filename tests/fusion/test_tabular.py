"""The columns of the table itself as a modality."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from contracts.catalog import read_table
from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.predictions import read_predictions
from contracts.workspace import Workspace
from fusion.all_embeddings import predict, train
from fusion.all_embeddings.config import MODALITIES, AllEmbeddingsSettings, ModelConfig
from fusion.all_embeddings.model import FUSIONS, AllEmbeddings
from fusion.dataset import FusionTable
from fusion.tabular import FEWEST_ROWS, MOST_CATEGORIES, TableColumns, TabularBranch

RUN = AllEmbeddingsSettings.run
QUICK = [
    "--preset", "tiny", "--width", "16", "--heads", "2", "--epochs", "25", "--batch-size", "64", "--device", "cpu",
]  # fmt: skip
WIDTHS = {"clip_image": 5, "siglip_image": 6, "siglip_text": 4, "qwen_text": 7}


def table_of(**features):
    return pd.DataFrame({f"feature_{name}": values for name, values in features.items()})


def matrix_of(columns, **features):
    return columns.matrix(table_of(**features))[0]


def test_numbers_are_standardised_with_a_flag_for_missing_ones():
    columns = TableColumns.fit(table_of(size=[-1.0, 0.0, 4.0, np.nan]))
    assert columns.width == 3
    deviation = np.std([-1, 0, 4])
    expected = [[1, (4 - 1) / deviation, 0], [1, 0, 1], [1, (-1 - 1) / deviation, 0]]
    np.testing.assert_allclose(matrix_of(columns, size=[4.0, np.nan, -1.0]), expected, rtol=1e-6)
    # beyond the rows that it was fitted on, a number counts as the end of their range
    np.testing.assert_array_equal(matrix_of(columns, size=[1e9, -1e9]), matrix_of(columns, size=[4.0, -1.0]))


def test_ratios_matter_where_all_numbers_are_positive():
    columns = TableColumns.fit(table_of(weight_kg=[0.1, 1.0, 10.0]))
    first, second, third = matrix_of(columns, weight_kg=[0.1, 1.0, 10.0])[:, 1]
    assert second == pytest.approx(0, abs=1e-6) and third == pytest.approx(-first)
    assert np.isfinite(matrix_of(columns, weight_kg=[0.0, -3.0])).all()


def test_constant_and_empty_columns_say_nothing_and_stay_finite():
    columns = TableColumns.fit(table_of(same=[0.1] * 7, empty=[np.nan] * 7))
    matrix = matrix_of(columns, same=[0.1, 5.0, np.nan], empty=[np.nan, 3.0, np.nan])
    np.testing.assert_allclose(matrix, [[1, 0, 0, 0, 1], [1, 0, 0, 0, 0], [1, 0, 1, 0, 1]], atol=1e-6)


def test_categories_frequent_rare_unseen_and_absent():
    brands = ["Acme"] * FEWEST_ROWS + ["zorn "] * (FEWEST_ROWS + 1) + ["Rare", "rarer", ""]
    columns = TableColumns.fit(table_of(brand=brands))
    assert columns.categories["brand"].frequent == ["acme", "zorn"]
    matrix, is_stated = columns.matrix(table_of(brand=["ACME", " Zorn", "rare", "RARER", "nobody", "", None]))
    expected = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(matrix[:, 1:], expected)
    assert is_stated.tolist() == [True] * 5 + [False] * 2


def test_the_number_of_categories_is_bounded():
    names = [f"brand {number:03d}" for number in range(MOST_CATEGORIES + 50)]
    columns = TableColumns.fit(table_of(brand=names * FEWEST_ROWS))
    assert columns.width == MOST_CATEGORIES + 2
    assert len(columns.categories["brand"].rare) == 50


def test_a_row_without_any_feature_is_missing():
    columns = TableColumns.fit(table_of(size=[1.0, 2.0], brand=["a", "b"]))
    _, is_stated = columns.matrix(table_of(size=[np.nan, 1.0, np.nan], brand=["", "", "a"]))
    assert is_stated.tolist() == [False, True, True]


def test_the_order_of_the_rows_does_not_matter():
    random = np.random.default_rng(0)
    rows = table_of(size=random.normal(size=90).round(3), brand=random.choice(list("abcdefghijklmnop"), 90))
    shuffled = rows.sample(frac=1, random_state=1)
    columns, other = TableColumns.fit(rows), TableColumns.fit(shuffled)
    assert columns.categories == other.categories
    np.testing.assert_allclose(columns.matrix(rows)[0], other.matrix(rows)[0], rtol=1e-5, atol=1e-6)


def test_json_round_trip():
    columns = TableColumns.fit(table_of(size=[1.0, 2.0, np.nan], brand=["é", "b", ""]))
    assert TableColumns.from_json(json.loads(json.dumps(columns.to_json()))) == columns


def test_a_missing_column_and_words_for_numbers_are_one_line():
    columns = TableColumns.fit(table_of(size=[1.0, 2.0]))
    with pytest.raises(
        InputError, match="no column feature_size, which the model reads; name size in --features"
    ):
        columns.matrix(table_of(brand=["a"]))
    with pytest.raises(InputError, match="column feature_size: a number is expected"):
        columns.matrix(table_of(size=["heavy"]))


def test_the_size_of_a_single_number_reaches_the_branch():
    """A LayerNorm over the number and its flag alone would leave its sign only."""
    torch.manual_seed(0)
    columns = TableColumns.fit(table_of(size=np.linspace(-2, 2, 50)))
    branch = TabularBranch(d_in=columns.width, hidden=8)
    normed = branch.norm(torch.from_numpy(matrix_of(columns, size=[0.5, 1.0, 2.0])))
    assert (normed[0] - normed[1]).abs().max() > 0.1 and (normed[1] - normed[2]).abs().max() > 0.1


def small_table(rows=12):
    generator = torch.Generator().manual_seed(0)
    embeddings = {name: torch.randn(rows, width, generator=generator) for name, width in WIDTHS.items()}
    frame = table_of(size=np.arange(rows, dtype=float), brand=["a", "b", ""] * (rows // 3))
    frame.loc[[1, 5], "feature_size"] = np.nan
    frame.loc[5, "feature_brand"] = ""
    valid = torch.rand(rows, len(WIDTHS), generator=generator) > 0.2
    return FusionTable.of(frame, embeddings, valid)


@pytest.mark.parametrize("variant", list(FUSIONS))
def test_every_variant_reads_the_columns_where_they_are(variant):
    table = small_table()
    columns = TableColumns.fit(table.rows)
    with_columns = table.with_tabular(columns)
    assert list(with_columns.widths) == [*MODALITIES, "tabular"]
    assert with_columns.valid[:, -1].tolist() == [row != 5 for row in range(12)]
    torch.manual_seed(0)
    model = AllEmbeddings(ModelConfig(variant=variant, width=16, heads=2, dropout=0.0), with_columns.widths)
    everything = torch.arange(12)
    embeddings, valid = with_columns.take(everything)
    usual = model(embeddings, valid).log_price
    other = embeddings | {"tabular": embeddings["tabular"].roll(1, dims=0)}
    changed = ~torch.isclose(model(other, valid).log_price, usual)
    assert changed.sum() >= 10 and not changed[5]
    hidden = valid.clone()
    hidden[:, -1] = False
    nothing = embeddings | {"tabular": torch.full_like(embeddings["tabular"], float("nan"))}
    without = model(nothing, hidden).log_price
    assert without.isfinite().all() and torch.equal(without[5], usual[5])


def test_a_table_without_features_stays_as_it_is():
    table = small_table()
    assert table.with_tabular(None) is table


@pytest.fixture
def workspace(empty_workspace, write_embedding, tmp_path):
    """The embeddings are noise; the weight tells the price, and the brand doubles it."""
    shutil.copytree(empty_workspace.root, tmp_path, dirs_exist_ok=True)
    workspace = Workspace(tmp_path)
    catalog = read_json(workspace.path("catalog"))
    features = {"weight_kg": "number", "brand": "category"}
    write_json(workspace.path("catalog"), {**catalog, "features": features})
    for split in ("train", "test"):
        random = np.random.default_rng(len(split))
        path = workspace.path("prepared", split=split)
        rows = read_table(path)
        brand = random.choice(["Acme", "Zorn"], len(rows))
        weight = np.exp(random.normal(size=len(rows)))
        rows["feature_weight_kg"] = np.where(random.random(len(rows)) < 0.1, "", weight.round(4).astype(str))
        rows["feature_brand"] = brand
        if split == "train":
            rows["price"] = (10 * weight * np.where(brand == "Zorn", 4, 1)).round(2).astype(str)
        rows.to_csv(path, index=False)
        for name, width in WIDTHS.items():
            write_embedding(workspace, split, name, random.normal(size=(len(rows), width)))
    return workspace


def at(workspace, *flags):
    return ["--workspace", str(workspace.root), *flags]


def test_a_model_learns_from_the_columns(workspace):
    with_columns = train.main(at(workspace, *QUICK))
    used = list(WIDTHS)
    without = train.main(at(workspace, *QUICK, "--run", "without", "--use", *used))
    alone = train.main(at(workspace, *QUICK, "--run", "alone", "--use", "tabular"))
    assert with_columns["validation_smape"] < without["validation_smape"] - 20
    assert alone["validation_smape"] < without["validation_smape"] - 20
    inputs = read_json(workspace.path("run", name=RUN) / "inputs.json")
    assert inputs["widths"] == {**WIDTHS, "tabular": 1 + 2 + 3}
    assert "tabular" not in read_json(workspace.path("run", name="without") / "inputs.json")["widths"]


def test_the_columns_are_learnt_from_the_rows_to_fit(workspace):
    """A brand of the validation rows alone is an unseen one."""
    path = workspace.path("prepared", split="train")
    rows = read_table(path)
    fold = workspace.folds()[rows["sample_id"]].to_numpy()
    rows.loc[fold == 0, "feature_brand"] = "Elsewhere"
    rows.to_csv(path, index=False)
    flags = [*QUICK, "--epochs", "1"]
    train.main(at(workspace, *flags, "--refit"))
    brands = {}
    for run in (RUN, f"{RUN}/all"):
        inputs = read_json(workspace.path("run", name=run) / "inputs.json")
        brands[run] = inputs["tabular"]["categories"]["brand"]["frequent"]
    assert brands == {RUN: ["acme", "zorn"], f"{RUN}/all": ["acme", "elsewhere", "zorn"]}


def test_prediction_by_other_brands_and_empty_cells(workspace):
    train.main(at(workspace, *QUICK, "--epochs", "3", "--folds", "2"))
    path = workspace.path("prepared", split="test")
    rows = read_table(path)
    rows.loc[:9, "feature_brand"] = "nobody"
    rows.loc[5:14, ["feature_brand", "feature_weight_kg"]] = ""
    rows.to_csv(path, index=False)
    predict.main(["test", *at(workspace)])
    before = read_predictions(workspace, RUN, "test").by_id
    assert np.isfinite(before).all()
    rows[::-1].to_csv(path, index=False)
    predict.main(["test", *at(workspace)])
    after = read_predictions(workspace, RUN, "test").by_id
    pd.testing.assert_series_equal(after[before.index], before, rtol=1e-6)
    rows.drop(columns="feature_brand").to_csv(path, index=False)
    with pytest.raises(InputError, match="no column feature_brand"):
        predict.main(["test", *at(workspace)])


def test_use_says_whether_the_columns_count(workspace, empty_workspace):
    with pytest.raises(InputError, match="--use bert: choose from clip_image, .*, tabular"):
        train.main(at(workspace, *QUICK, "--use", "bert"))
    shutil.copytree(workspace.root / "data" / "embeddings", workspace.root / "plain" / "data" / "embeddings")
    for name in ("prepared_train.csv", "folds.csv", "catalog.json"):
        shutil.copy(empty_workspace.root / "data" / name, workspace.root / "plain" / "data")
    with pytest.raises(InputError, match="--use tabular: the table has no feature columns"):
        train.main(["--workspace", str(workspace.root / "plain"), *QUICK, "--use", "siglip_text", "tabular"])
