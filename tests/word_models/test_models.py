"""The models as functions: what they may see, and what they compute."""

import numpy as np
import pytest
import torch

from contracts.errors import InputError
from contracts.smape import smape
from word_models.config import WordModelSettings
from word_models.features import build_features
from word_models.loss import smape_fraction
from word_models.models import kernel_estimates, neighbour_prices
from word_models.sparse_mlp import PriceBins, SparseMlp, as_tensors
from word_models.surroundings import COLUMNS, PRICE_COLUMNS


@pytest.fixture(scope="module")
def features(tables):
    return build_features(**tables)["train"]


@pytest.fixture(scope="module")
def ln_price(tables):
    return np.log(tables["train"]["price"].to_numpy())


def test_a_second_model_learns_from_prices_by_other_rows_only(features, ln_price):
    """Were the kernel's fit of a row's own price shown, it would correlate with the price far beyond other rows'."""
    shuffled = np.random.default_rng(0).permutation(ln_price)
    fit = features[np.arange(300)]
    apply = features[np.arange(300, 400)]
    settings = WordModelSettings(model="boosted", kernel_steps=5)
    left_out, predicted = kernel_estimates(settings, fit, shuffled[:300], apply)
    near = left_out.surroundings.reshape(300, -1, len(COLUMNS)).copy()
    near[..., PRICE_COLUMNS] += left_out.ln_price[:, None, None]  # the prices themselves
    for column in (left_out.ln_price, *near.reshape(300, -1).T):
        # prices without meaning cannot be foreseen
        assert np.corrcoef(column, shuffled[:300])[0, 1] < 0.2
    assert len(predicted.ln_price) == len(predicted.surroundings) == 100


def test_neighbours_of_a_fitted_row_do_not_hold_its_own_price(features, ln_price):
    seen = neighbour_prices(features, ln_price, features, skip_self=True)
    moved = ln_price.copy()
    moved[17] += 5
    after = neighbour_prices(features, moved, features, skip_self=True)
    assert [column[17] for column in after] == pytest.approx([column[17] for column in seen])
    own = neighbour_prices(features, ln_price, features)
    assert np.mean(own.nearest == ln_price) > 0.9  # without skip_self the nearest product is the row itself


def test_neighbour_prices_are_the_formula(features, ln_price):
    """Against a plain loop over three rows."""
    terms = features.terms.toarray().astype(float)
    terms /= np.linalg.norm(terms, axis=1, keepdims=True)
    found = neighbour_prices(features[np.arange(3, 400)], ln_price[3:], features[np.arange(3)])
    for row in range(3):
        cosine = terms[3:] @ terms[row]
        nearest = np.argsort(-cosine)[:20]
        weight = cosine[nearest] ** 4
        assert found.mean[row] == pytest.approx(weight @ ln_price[3:][nearest] / weight.sum(), abs=1e-4)
        assert found.nearest[row] == ln_price[3:][nearest[0]]
        assert found.similarity[row] == pytest.approx(cosine.max(), abs=1e-5)


def test_best_price_minimises_expected_smape():
    bins = PriceBins(9, scale=1.0)
    probability = torch.softmax(torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    best = bins.best_price(probability)
    prices = torch.exp(bins.centres).tolist()

    def expected(row, ln_price):
        terms = [smape([price], [np.exp(ln_price)]) for price in prices]
        return float(np.dot(probability[row].numpy(), terms))

    for row in range(5):
        others = [expected(row, candidate) for candidate in np.linspace(-2.8, 3.0, 36)]
        assert expected(row, best[row].item()) <= min(others) + 1e-3


def test_batch_of_rows_equals_the_dense_product(features):
    rows = features[np.arange(7)]
    torch.manual_seed(0)
    model = SparseMlp(terms=rows.terms.shape[1], dense=rows.dense.shape[1], hidden=8, outputs=2)
    terms = torch.from_numpy(rows.terms.toarray())
    first = terms @ model.terms.weight + model.dense(torch.from_numpy(rows.dense))
    torch.testing.assert_close(model(*as_tensors(rows)), model.layers(first), rtol=1e-4, atol=1e-5)


def test_loss_is_the_metric_as_a_fraction_of_its_range():
    actual = np.array([3.0, 10.0, 100.0])
    predicted = np.array([3.5, 2.0, 120.0])
    loss = smape_fraction(torch.from_numpy(np.log(predicted / actual)))
    assert loss.item() == pytest.approx(smape(actual, predicted) / 200)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"bins": 2}, "--bins 2"),
        ({"epochs": 0}, "--epochs 0"),
        ({"kernel_steps": -1}, "--kernel-steps -1"),
        ({"word_dropout": 1.0}, "--word-dropout 1.0"),
        ({"embeddings": ("a", "b", "a")}, "--embeddings a: named twice"),
    ],
)
def test_senseless_settings_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        WordModelSettings(**setting)
