from dataclasses import replace

import numpy as np
import pytest
import torch

from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.smape import smape
from contracts.workspace import Workspace
from word_models.compared import FEW_ROWS, ComparedRows
from word_models.config import WordModelSettings
from word_models.features import build_features
from word_models.kernel import KernelModel, compare
from word_models.similarity import Similarity, learn
from word_models.surroundings import COLUMNS, POWERS, SLOPE_PRIOR, USUAL_SLOPE, surroundings

SETTINGS = WordModelSettings(model="kernel", kernel_steps=15)


@pytest.fixture(scope="module")
def products(sample_workspace):
    """Features and ln price of 400 rows; two views of meaning, and a column that an embedding file has named."""
    workspace = Workspace(sample_workspace)
    table = workspace.prepared("train")
    features = build_features(table, workspace.prepared("test"))["train"]
    ln_price = np.log(table["price"].to_numpy())
    hint = ln_price + np.random.default_rng(0).normal(0, 0.3, len(ln_price))
    features = features.with_columns({"encoder: log_price": hint[:, None]})
    return replace(features, meanings=features.meanings[:2]), ln_price


def test_similarity_is_the_formula(products):
    """Against a plain loop on a few pairs."""
    features, _ = products
    fit = features[np.arange(12)]
    asked = features[np.arange(12, 15)]
    compared = ComparedRows.of(asked).differences(ComparedRows.of(fit))
    similarity = Similarity.start(len(compared), len(fit.compared_columns), seed=0)
    found = similarity(compared)

    def cosine(a, b):
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    assert list(fit.compared_columns)[-2:] == ["unit_kind", "encoder: log_price"]
    for i in range(3):
        for j in range(12):
            unlike = [
                1 - cosine(asked.terms[[i], block].toarray()[0], fit.terms[[j], block].toarray()[0])
                for block in fit.compared_terms
            ]
            unlike += [1 - cosine(a[i], f[j]) for a, f in zip(asked.meanings, fit.meanings, strict=True)]
            unlike += [
                0.5 * ((asked.structural[i, columns] - fit.structural[j, columns]) ** 2).sum()
                for columns in fit.compared_columns.values()
            ]
            exponent = -(similarity.rate.exp().numpy() * np.array(unlike)).sum(axis=1)
            expected = (similarity.scale.exp().numpy() * np.exp(exponent)).sum()
            assert found[i, j].item() == pytest.approx(expected, rel=1e-4)


def test_left_out_price_is_the_price_without_the_row(products):
    features, ln_price = products
    rows = np.arange(60)
    model = KernelModel.fit(SETTINGS, features[rows], ln_price[:60])
    compared = ComparedRows.of(features[rows])
    gram = model.similarity(compared.differences(compared)).double().numpy()
    noise, known = float(model.similarity.noise.exp()), ln_price[:60] - ln_price[:60].mean()
    for left in (0, 17, 59):
        others = rows != left
        weights = np.linalg.solve(gram[np.ix_(others, others)] + noise * np.eye(59), known[others])
        expected = ln_price[:60].mean() + gram[left, others] @ weights
        assert model.left_out.ln_price[left] == pytest.approx(expected, abs=2e-3)


def test_predictions_do_not_depend_on_how_many_rows_are_compared_at_once(products):
    features, ln_price = products
    model = KernelModel.fit(SETTINGS, features[np.arange(200)], ln_price[:200])
    asked = features[np.arange(200, 400)]
    whole = model.estimate(asked)
    slabs = model.estimate(asked, rows_at_once=37)
    np.testing.assert_allclose(slabs.ln_price, whole.ln_price, atol=1e-9)
    np.testing.assert_allclose(slabs.surroundings, whole.surroundings, atol=1e-9)


@pytest.mark.parametrize("count", [3, FEW_ROWS + 1, 60])
def test_differences_do_not_depend_on_how_words_are_multiplied(products, count):
    """Common terms as dense columns, rare ones as sparse ones, or all as sparse ones for few rows."""
    features, _ = products
    fit = ComparedRows.of(features)
    asked = fit[np.arange(count)]
    found = asked.double().differences(fit)
    assert found.dtype == torch.float64
    for block, by_block in zip(fit.words, found, strict=False):
        rows = block.toarray().astype(np.float64)
        np.testing.assert_allclose(by_block.numpy(), 1 - rows[:count] @ rows.T, atol=1e-6)
    torch.testing.assert_close(asked.differences(fit).double(), found, atol=1e-5, rtol=1e-5)


def test_surroundings_are_weighted_least_squares():
    """Against numpy's weighted fit; the line is drawn towards the usual slope by a prior."""
    rng = np.random.default_rng(0)
    similarity, ln_price, fit_amount, amount = (
        rng.random((3, 40)),
        *rng.normal(size=(2, 40)),
        rng.normal(size=3),
    )
    found = surroundings(*(torch.from_numpy(x) for x in (similarity, ln_price, fit_amount, amount)))
    assert found.shape == (3, len(POWERS), len(COLUMNS))
    for row in range(3):
        for power, columns in zip(POWERS, found[row].tolist(), strict=True):
            weights = similarity[row] ** power / (similarity[row] ** power).sum()
            mean, mean_amount = weights @ ln_price, weights @ fit_amount
            spread = weights @ (fit_amount - mean_amount) ** 2
            slope = np.polyfit(fit_amount, ln_price, 1, w=np.sqrt(weights))[0]
            slope = (slope * spread + USUAL_SLOPE * SLOPE_PRIOR) / (spread + SLOPE_PRIOR)
            distance = amount[row] - mean_amount
            deviation = np.sqrt(weights @ (ln_price - mean) ** 2)
            assert columns == pytest.approx([mean, mean + slope * distance, deviation, distance])


def test_surroundings_of_a_fitted_row_are_those_without_it(products):
    """Each by a model that has the same similarity but not the row; and in words alone amounts do not count."""
    features, ln_price = products
    rows = np.arange(50)
    fit, known = features[rows], torch.from_numpy(ln_price[rows]).float()
    similarity = Similarity.start(5 + len(fit.compared_columns), len(fit.compared_columns), seed=0)
    of_fit = ComparedRows.of(fit)
    _, near = compare(similarity, of_fit, of_fit, known, first_self=0)
    for left in (0, 20, 49):
        others = np.delete(rows, left)
        _, expected = compare(similarity, of_fit[[left]], of_fit[others], known[others])
        torch.testing.assert_close(near[left], expected[0], atol=1e-4, rtol=1e-4)
    structural = np.zeros_like(features.structural)
    structural[:, features.columns["total_amount"]] = features.columns_named("total_amount")  # of the line
    without_amounts = ComparedRows.of(replace(features, structural=structural)[rows])
    _, without = compare(similarity, without_amounts, of_fit, known, first_self=0)
    torch.testing.assert_close(without[:, 1], near[:, 1])
    assert (without[:, 0] - near[:, 0]).abs().max() > 0.01


def test_a_row_unlike_all_others_has_the_mean_of_all():
    far = torch.full((1, 4), torch.finfo(torch.float32).tiny)
    prices = torch.tensor([1.0, 2.0, 3.0, 6.0])
    found = surroundings(far, prices, torch.zeros(4), torch.zeros(1))
    assert found[0, :, 0].tolist() == [3.0] * len(POWERS) and found.isfinite().all()


def test_learning_lowers_the_left_out_error_and_finds_what_matters(products):
    features, ln_price = products
    compared = ComparedRows.of(features)

    def left_out_smape(similarity):
        gram = similarity(compared.differences(compared)) + similarity.noise.exp() * torch.eye(len(ln_price))
        inverse = torch.linalg.inv(gram)
        known = torch.from_numpy(ln_price - ln_price.mean()).float()
        left_out = ln_price - ((inverse @ known) / inverse.diagonal()).numpy()
        return smape(np.exp(ln_price), np.exp(left_out))

    amounts = len(features.compared_columns)
    start = Similarity.start(5 + amounts, amounts, seed=0)
    learned = learn(WordModelSettings(model="kernel", kernel_steps=40), compared, ln_price)
    assert left_out_smape(learned) < left_out_smape(start) - 3
    # a price with some noise is asked for far more than the length of a text
    rate = dict(zip(features.compared_columns, learned.rate[:, -amounts:].T, strict=True))
    assert rate["encoder: log_price"].max() > rate["text_length"].max() + 1


def test_a_saved_model_estimates_the_same(products, tmp_path):
    features, ln_price = products
    model = KernelModel.fit(SETTINGS, features[np.arange(200)], ln_price[:200])
    model.save(tmp_path)
    loaded = KernelModel.load(tmp_path)
    asked = features[np.arange(200, 400)]
    found = loaded.estimate(asked)
    expected = model.estimate(asked)
    np.testing.assert_allclose(found.ln_price, expected.ln_price, atol=2e-5)
    np.testing.assert_allclose(found.surroundings, expected.surroundings, atol=1e-4)
    np.testing.assert_array_equal(loaded.left_out.ln_price, model.left_out.ln_price)
    np.testing.assert_array_equal(loaded.left_out.surroundings, model.left_out.surroundings)


def test_a_damaged_or_foreign_file_is_named(products, tmp_path):
    features, ln_price = products
    KernelModel.fit(SETTINGS, features[np.arange(60)], ln_price[:60]).save(tmp_path)
    whole = (tmp_path / "kernel.npz").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\x80\x04K\x01."):
        (tmp_path / "kernel.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="kernel.npz: not readable"):
            KernelModel.load(tmp_path)
    written = read_json(tmp_path / "kernel.json")
    write_json(tmp_path / "kernel.json", written | {"schema": 99})
    with pytest.raises(InputError, match="kernel.json: schema 99"):
        KernelModel.load(tmp_path)
