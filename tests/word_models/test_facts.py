"""Further facts: columns feature_<name> as numbers and categories."""

import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from contracts.files import read_json, write_json
from training.number_column import NumberColumn
from word_models import train
from word_models.facts import Facts, fact_kinds
from word_models.features import FeatureBuilder, build_features

KINDS = {"weight_kg": "number", "brand": "category"}


@pytest.fixture(scope="module")
def with_facts(tables):
    """The tables with a weight, which every third row does not state, and one of three brands."""

    def add(table):
        rows = np.arange(len(table))
        weight = [f"{row + 1}" if row % 3 else "" for row in rows]
        return table.assign(feature_weight_kg=weight, feature_brand=np.array(["Acme", "zorn ", ""])[rows % 3])

    return {name: add(table) for name, table in tables.items()}


def test_without_facts_the_features_are_bit_identical(tables, with_facts):
    """The columns are in the table, but the catalogue does not name them."""
    plain = build_features(**tables)["train"]
    unnamed = build_features(**with_facts, facts={})["train"]
    assert (plain.terms != unnamed.terms).nnz == 0
    np.testing.assert_array_equal(plain.dense, unnamed.dense)
    named = build_features(**with_facts, facts=KINDS)["train"]
    width = plain.structural.shape[1]
    np.testing.assert_array_equal(named.structural[:, :width], plain.structural)
    assert (named.terms[:, : plain.terms.shape[1]] != plain.terms).nnz == 0


def test_a_number_is_standardised_in_its_logarithm_and_a_missing_one_flagged(with_facts):
    train_rows = build_features(**with_facts, facts=KINDS)["train"]
    value, missing = train_rows.columns_named("feature_weight_kg").T
    stated = np.arange(len(train_rows)) % 3 > 0
    assert missing.tolist() == (~stated).astype(float).tolist()
    logarithm = np.log(np.arange(len(train_rows)) + 1)[stated]
    np.testing.assert_allclose(value[stated], (logarithm - logarithm.mean()) / logarithm.std(), atol=1e-4)
    assert np.all(value[~stated] == 0)
    assert "feature_weight_kg" in train_rows.compared_columns


def test_a_number_beyond_the_range_counts_as_its_end_and_others_have_no_logarithm():
    fact = NumberColumn.fit(np.array([1.0, 10.0, np.nan]))
    assert (
        fact.columns(np.array([-5.0, 1e9]))[:, 0].tolist()
        == fact.columns(np.array([1.0, 10.0]))[:, 0].tolist()
    )
    degrees = NumberColumn.fit(np.array([-20.0, 0.0, 20.0])).columns(np.array([-20.0, 0.0, 20.0]))[:, 0]
    np.testing.assert_allclose(degrees, np.array([-1, 0, 1]) * np.sqrt(1.5), atol=1e-6)
    assert NumberColumn.fit(np.full(3, np.nan)).columns(np.array([np.nan, 7.0])).tolist() == [[0, 1], [0, 0]]


def test_a_category_is_one_term_that_the_kernel_compares(with_facts):
    features = build_features(**with_facts, facts=KINDS)["train"]
    builder = FeatureBuilder.fit(with_facts["train"], [], facts=KINDS)
    assert builder.term_names().text[-2:].tolist() == ["brand=acme", "brand=zorn"]
    block = features.terms[:, features.compared_terms[-1]].toarray()
    assert block[:3].tolist() == [[1, 0], [0, 1], [0, 0]]
    unknown = with_facts["test"].assign(feature_brand="nobody")
    assert builder(unknown).terms[:, features.compared_terms[-1]].nnz == 0


def test_a_category_of_one_product_is_no_term():
    table = pd.DataFrame({"feature_brand": ["a", "a", "b"]})
    assert Facts.fit(table, {"brand": "category"}).categories == {"brand": ["a"]}
    assert Facts.fit(table[1:], {"brand": "category"}).terms(table) == {}


def test_loaded_features_are_the_fitted_ones(with_facts, tmp_path):
    builder = FeatureBuilder.fit(with_facts["train"], [with_facts["test"]], facts=KINDS)
    builder.save(tmp_path)
    before = builder(with_facts["test"])
    after = FeatureBuilder.load(tmp_path)(with_facts["test"])
    assert (before.terms != after.terms).nnz == 0
    np.testing.assert_array_equal(before.dense, after.dense)
    assert before.columns == after.columns and before.compared_terms == after.compared_terms


def test_a_table_without_the_column_or_with_text_for_a_number_is_refused(tables, with_facts):
    builder = FeatureBuilder.fit(with_facts["train"], [], facts=KINDS)
    with pytest.raises(InputError, match="no column feature_brand.*name brand in --features"):
        builder(tables["test"])
    with pytest.raises(InputError, match="column feature_weight_kg: a number is expected"):
        builder(with_facts["test"].assign(feature_weight_kg="heavy"))


def test_facts_that_set_the_price_lower_the_error(workspace):
    flags = ["--workspace", str(workspace.root), "--model", "ridge"]
    without = train.main(flags)["smape"]
    table = workspace.prepared("train")
    dear = np.arange(len(table)) % 3
    table["price"] = 10.0 * (1 + dear) * np.exp(np.random.default_rng(0).normal(0, 0.1, len(table)))
    table["feature_grade"] = np.array(["basic", "plus", "pro"])[dear]
    table.to_csv(workspace.path("prepared", split="train"), index=False)
    test = workspace.prepared("test").assign(feature_grade="pro")
    test.to_csv(workspace.path("prepared", split="test"), index=False)
    catalog = read_json(workspace.path("catalog"))
    write_json(workspace.path("catalog"), catalog | {"features": {"grade": "category"}})
    assert fact_kinds(workspace) == {"grade": "category"}
    assert train.main(flags)["smape"] < 15 < without
