"""Features: terms from training texts alone, and structural columns that are known by name."""

import numpy as np
import pandas as pd
import pytest

from word_models.amounts import UNIT_KINDS, amount_bins, amounts
from word_models.features import build_features


@pytest.fixture(scope="module")
def features(tables):
    return build_features(**tables)


def test_vocabulary_comes_from_training_texts(tables, features):
    changed = tables["test"].assign(entity_name="ξξξψ", catalog_content="ξξξψ ψψ")
    again = build_features(tables["train"], changed)
    assert (again["train"].terms != features["train"].terms).nnz == 0
    assert again["test"].terms.shape[1] == features["test"].terms.shape[1]
    assert again["test"].terms.nnz == 0


def test_names_cover_every_structural_column_once_and_in_order(features):
    end = 0
    for where in features["train"].columns.values():
        assert where.start == end and where.stop > end
        end = where.stop
    assert end == features["train"].structural.shape[1]
    assert features["train"].columns == features["test"].columns


def test_each_name_leads_to_its_values(tables, features):
    train = tables["train"]
    log_total = np.log1p(train["total_amount"].fillna(0).to_numpy())
    expected = (log_total - log_total.mean()) / log_total.std()
    np.testing.assert_allclose(features["train"].amount, expected, atol=1e-4)
    for name in ("pack_count", "item_size", "quantity_value", "text_length", "title_length"):
        column = features["train"].columns_named(name)[:, 0]
        values = train["catalog_content" if name == "text_length" else "entity_name"].str.len()
        if name in train:
            values = train[name].fillna(0)
        # what is standardised keeps the order of the rows
        assert pd.Series(column).corr(values.reset_index(drop=True), method="spearman") > 0.999
    kinds = features["train"].columns_named("unit_kind").argmax(axis=1)
    assert np.array(UNIT_KINDS)[kinds].tolist() == train["unit_kind"].tolist()
    bins = features["train"].columns_named("total_amount_bins")
    assert bins.sum(axis=1).tolist() == [1.0] * len(train)
    assert np.all(np.diff(bins.argmax(axis=1)[np.argsort(log_total)]) >= 0)


def test_amounts_by_kind_are_zero_for_other_kinds(tables):
    columns = amounts(tables["train"])
    by_kind = columns["total_amount_by_kind"]
    np.testing.assert_array_equal(by_kind.sum(axis=1), columns["total_amount"][:, 0])
    assert np.all(by_kind[columns["unit_kind"] == 0] == 0)


def test_an_amount_that_is_not_stated_counts_zero(tables):
    unknown = tables["train"].iloc[:2].assign(total_amount=np.nan, item_size=np.nan)
    assert amounts(unknown)["total_amount"].tolist() == [[0.0], [0.0]]
    assert amount_bins(unknown)["total_amount_bins"].argmax(axis=1).tolist() == [1, 1]  # the bin from 0 on


def test_rows_and_added_columns_keep_the_names(features):
    rows = np.array([5, 3])
    some = features["train"][rows].with_columns({"hint": np.array([[1.0, 2.0], [3.0, 4.0]])})
    assert len(some) == 2
    assert some.columns_named("hint").tolist() == [[1, 2], [3, 4]]
    np.testing.assert_array_equal(some.amount, features["train"].amount[rows])
    assert some.structural.dtype == np.float32
    assert list(some.columns) == [*features["train"].columns, "hint"]
    assert "hint" in some.compared_columns and "total_amount_bins" not in some.compared_columns
    assert "hint" not in features["train"].columns
