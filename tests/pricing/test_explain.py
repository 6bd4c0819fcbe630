import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from contracts.workspace import Workspace
from pricing import PriceModel


@pytest.fixture(scope="module")
def model(word_system):
    return PriceModel.load(word_system, device="cpu")


def test_members_combine_to_the_price(model):
    explained = model.explain({"catalog_content": "Item Name: Green Tea, 12 oz\nValue: 12.0\nUnit: Ounce\n"})
    members = explained.members
    assert set(members["member"]) == {"words_ridge_frozen_text", "words_mlp"}
    combined = np.exp((np.log(members["price"]) * members["weight"]).sum())
    assert combined == pytest.approx(explained.price["price"], rel=1e-3)


def test_a_known_product_is_nearest_to_itself(model, word_system):
    known = Workspace(word_system).prepared("train")
    explained = model.explain(known.iloc[[7]])
    nearest = explained.known_products
    assert len(nearest) == 5
    assert nearest["sample_id"][0] == known["sample_id"][7]
    assert nearest["similarity"][0] == pytest.approx(1, abs=1e-3)
    assert nearest["price"][0] == known["price"][7]
    assert nearest["similarity"].is_monotonic_decreasing
    assert known["sample_id"][7] in str(explained)


def test_without_an_embedding_words_are_compared(copy_of, word_system):
    root = copy_of(word_system)
    Workspace(root).path("embeddings", name="frozen_text", split="train").unlink()
    model = PriceModel.load(root, device="cpu")
    known = Workspace(root).prepared("train")
    name = known["entity_name"][7]
    explained = model.explain({"catalog_content": f"Item Name: {name}"})
    assert explained.compared_by == "the words of their names"
    assert explained.known_products["name"][0] == name
    nothing = model.explain({"catalog_content": "Item Name: zzzz"})
    assert len(nothing.known_products) == 0


def test_one_product_at_a_time(model):
    with pytest.raises(InputError, match="one product, not 2"):
        model.explain(pd.DataFrame({"catalog_content": ["a", "b"]}))


def test_the_factor_of_a_word_is_what_the_price_loses_without_it(model, word_system):
    product = Workspace(word_system).prepared("train").iloc[[7]]
    found = model.explain(product).effects
    name = product["entity_name"].iloc[0]
    assert set(found["label"]) >= {name.split()[0], "amount"}
    word = found[found["kind"] == "word"].iloc[0]
    shorter = product.copy()
    for column in ("entity_name", "catalog_content", "text"):
        shorter[column] = shorter[column].str.replace(word["label"], "", regex=False)
    prices = model.predict(pd.concat([product, shorter]))["price"]
    assert word["factor"] == pytest.approx(prices[0] / prices[1], rel=1e-3)
    assert abs(np.log(word["factor"])) > 0.01
    assert model.explain({"catalog_content": ""}).effects.empty
