"""Explanations of several products at once, and the fast ones that keep the embeddings."""

import numpy as np
import pandas as pd
import pytest

from contracts.workspace import Workspace
from pricing import PriceModel
from pricing.explain import explain_each
from pricing.products import Products, described_products, products_of


@pytest.fixture(scope="module")
def model(word_system):
    return PriceModel.load(word_system, device="cpu")


@pytest.fixture(scope="module")
def products(model, word_system):
    return products_of(Workspace(word_system).prepared("train").iloc[[7, 20, 33]], model.mapping)


def effects_of(explanation):
    effects = explanation.effects
    return {(row.kind, row.label): row.factor for row in effects.itertuples()}


def test_products_together_are_explained_like_each_alone(model, products):
    together = explain_each(model, products, encode_again=False)
    for row, explanation in enumerate(together):
        alone = Products(
            products.ids[[row]], products.rows.iloc[[row]].assign(sample_id="0").reset_index(drop=True)
        )
        expected = explain_each(model, alone, encode_again=False)[0]
        assert explanation.price["price"] == pytest.approx(expected.price["price"], rel=1e-3)
        assert effects_of(explanation) == pytest.approx(effects_of(expected), rel=1e-3)
        assert explanation.known_products.equals(expected.known_products) or (
            explanation.known_products["sample_id"].tolist() == expected.known_products["sample_id"].tolist()
        )


def test_the_embedding_of_the_whole_text_may_be_kept(model, products):
    """The factor is then what the members themselves make of the word."""
    found = effects_of(explain_each(model, products, encode_again=False)[0])
    kind, word = next(key for key in found if key[0] == "word")
    shorter = products.rows.iloc[[0]].reset_index(drop=True)
    for column in ("entity_name", "catalog_content", "text"):
        shorter[column] = shorter[column].str.replace(rf"(?<!\w){word}(?!\w)", "", regex=True)
    both = Products(np.array(["0", "1"]), pd.concat([products.rows.iloc[[0]], shorter], ignore_index=True))
    both.rows["sample_id"] = both.ids
    embeddings = model.encode(both)
    for embedding in embeddings.values():
        embedding.embeddings[1] = embedding.embeddings[0]
    whole, without = model.price_encoded(both, embeddings).prices["price"]
    assert found[kind, word] == pytest.approx(whole / without, rel=1e-3)
    exact = effects_of(explain_each(model, products)[0])
    assert set(exact) == set(found) and exact != pytest.approx(found, rel=1e-6)


def test_only_some_products_are_explained_and_only_some_words_erased(model, products):
    first, second, third = explain_each(model, products, most_words=2, with_effects=[True, False, True])
    assert second.effects.empty and len(second.known_products) == 5
    for explained in (first, third):
        assert (explained.effects["kind"] == "word").sum() == 2


def test_an_erased_amount_is_that_of_a_text_without_one(model, products):
    """Some columns of an amount are 0 and not absent where there is none."""
    from pricing.explain import AMOUNT_COLUMNS, _blank

    nothing = described_products(["a product"], [{}], [None], model.mapping).rows
    for column in AMOUNT_COLUMNS:
        expected = nothing[column].iloc[0]
        blank = _blank(column, is_number=pd.api.types.is_numeric_dtype(nothing[column]))
        assert blank == expected or (pd.isna(blank) and pd.isna(expected)), column


def test_few_known_products_are_less_similar_than_is_ordinary(model):
    known = model.known_products
    assert 0 < known.ordinary_similarity <= 0.5
