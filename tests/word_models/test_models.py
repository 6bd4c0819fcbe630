"""The models as functions: what they may see, and what they compute."""

import numpy as np
import pytest
import torch

from contracts.errors import InputError
from contracts.smape import smape
from word_models.config import WordModelSettings
from word_models.features import build_features
from word_models.kernel import KernelModel
from word_models.loss import smape_fraction
from word_models.models import MODELS
from word_models.neighbours import Neighbours
from word_models.sparse_mlp import BATCH_SIZES, PriceBins, SparseMlp, as_tensors, batches_of_passes
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
    model = KernelModel.fit(settings, fit, shuffled[:300])
    left_out = model.left_out
    predicted = model.estimate(apply)
    near = left_out.surroundings.reshape(300, -1, len(COLUMNS)).copy()
    near[..., PRICE_COLUMNS] += left_out.ln_price[:, None, None]  # the prices themselves
    for column in (left_out.ln_price, *near.reshape(300, -1).T):
        # prices without meaning cannot be foreseen
        assert np.corrcoef(column, shuffled[:300])[0, 1] < 0.2
    assert len(predicted.ln_price) == len(predicted.surroundings) == 100


def test_neighbours_of_a_fitted_row_do_not_hold_its_own_price(features, ln_price):
    def prices(ln_price, **options):
        return Neighbours.fit(WordModelSettings(), features, ln_price).prices(features, **options)

    seen = prices(ln_price, skip_self=True)
    moved = ln_price.copy()
    moved[17] += 5
    after = prices(moved, skip_self=True)
    assert [column[17] for column in after] == pytest.approx([column[17] for column in seen])
    own = prices(ln_price)
    assert np.mean(own.nearest == ln_price) > 0.9  # without skip_self the nearest product is the row itself


def test_neighbour_prices_are_the_formula(features, ln_price):
    """Against a plain loop over three rows."""
    terms = features.terms.toarray().astype(float)
    terms /= np.linalg.norm(terms, axis=1, keepdims=True)
    others = Neighbours.fit(WordModelSettings(), features[np.arange(3, 400)], ln_price[3:])
    found = others.prices(features[np.arange(3)])
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


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_price_depends_on_its_row_alone_and_survives_saving(features, ln_price, tmp_path, kind):
    settings = WordModelSettings(model=kind, seeds=2, kernel_steps=3, updates=1, trees=20, svd=16)
    model = MODELS[kind].fit(settings, features[np.arange(300)], ln_price[:300])
    asked = features[np.arange(300, 400)]
    batch = model.predict(asked)
    assert batch.dtype == np.float64 and batch.std() > 0.01
    # the networks compute in float32, in which a sum depends slightly on how many rows are added up together
    tolerance = 1e-5 if "mlp" in kind else 1e-9
    order = np.random.default_rng(0).permutation(100)
    np.testing.assert_allclose(model.predict(asked[order]), batch[order], rtol=tolerance)
    alone = [model.predict(asked[[row]])[0] for row in range(10)]
    np.testing.assert_allclose(alone, batch[:10], rtol=tolerance)

    model.save(tmp_path)
    np.testing.assert_allclose(MODELS[kind].load(tmp_path).predict(asked), batch, rtol=1e-12)


def test_few_rows_get_more_passes_and_many_rows_one_pass_per_part():
    # 5,600 rows, those outside a hold-out of 7,000: six passes with the batch size doubling three times
    assert batches_of_passes(5_600, WordModelSettings().updates) == [87, 43, 21, 10, 10, 10]
    assert batches_of_passes(60_000, WordModelSettings().updates) == [60_000 // size for size in BATCH_SIZES]
    few = batches_of_passes(320, WordModelSettings().updates)
    assert 150 <= sum(few) < 150 + 11  # a round of all parts has 11 batches
    assert few == sorted(few, reverse=True)  # batches only ever grow


def test_few_rows_are_learned_as_well_as_by_ridge(features, ln_price):
    """With 320 rows, six passes are 11 updates, after which the network still answers with nearly one price."""
    fit = np.arange(320)
    asked = np.arange(320, 400)
    score = {}
    for kind in ("ridge", "mlp"):
        model = MODELS[kind].fit(WordModelSettings(seeds=1), features[fit], ln_price[fit])
        score[kind] = smape(np.exp(ln_price[asked]), np.exp(model.predict(features[asked])))
    constant = smape(np.exp(ln_price[asked]), np.full(80, np.exp(np.median(ln_price[fit]))))
    assert score["mlp"] < constant - 15
    assert score["mlp"] < score["ridge"] + 6


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"bins": 2}, "--bins 2"),
        ({"updates": 0}, "--updates 0"),
        ({"predictions": "a/b"}, "--predictions a/b: must be a plain name"),
        ({"kernel_steps": -1}, "--kernel-steps -1"),
        ({"word_dropout": 1.0}, "--word-dropout 1.0"),
        ({"embeddings": ("a", "b", "a")}, "--embeddings a: named twice"),
    ],
)
def test_senseless_settings_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        WordModelSettings(**setting)
