from dataclasses import replace

import numpy as np
import pytest
import torch

from contracts.errors import InputError
from contracts.smape import smape
from contracts.workspace import Workspace
from tfidf_models import kernel
from tfidf_models.config import TfidfSettings
from tfidf_models.features import build_features, structural_fields
from tfidf_models.kernel import KernelModel, Similarity, differences, learn
from tfidf_models.models import MODELS

SETTINGS = TfidfSettings(model="kernel", kernel_steps=15)


@pytest.fixture(scope="module")
def products(sample_workspace):
    """Features and ln price of 400 rows; two views of meaning, and a column that an embedding file has named."""
    workspace = Workspace(sample_workspace)
    table = workspace.prepared("train")
    features, _ = build_features(table, workspace.prepared("test"))
    ln_price = np.log(table["price"].to_numpy())
    hint = ln_price + np.random.default_rng(0).normal(0, 0.3, len(ln_price))
    structural = np.hstack([features.structural, hint[:, None]]).astype(np.float32)
    return replace(features, structural=structural, meanings=features.meanings[:2]), ln_price


def test_similarity_is_the_formula(products):
    """Against a plain loop on a few pairs."""
    features, _ = products
    fit, asked = features[np.arange(12)], features[np.arange(12, 15)]
    compared = differences(asked, fit)
    similarity = Similarity.start(len(compared), len(fit.compared_amounts), seed=0)
    found = similarity(compared)

    def cosine(a, b):
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    fields = structural_fields()
    assert [fields[columns].tolist() for columns in fit.compared_amounts[6:7]] == [["unit kind"] * 4]
    assert fit.compared_amounts[-1] == [len(fields)]  # the named column
    for i in range(3):
        for j in range(12):
            unlike = [
                1 - cosine(asked.terms[[i], block].toarray()[0], fit.terms[[j], block].toarray()[0])
                for block in fit.compared_blocks
            ]
            unlike += [1 - cosine(a[i], f[j]) for a, f in zip(asked.meanings, fit.meanings, strict=True)]
            unlike += [
                0.5 * ((asked.structural[i, columns] - fit.structural[j, columns]) ** 2).sum()
                for columns in fit.compared_amounts
            ]
            exponent = -(similarity.rate.exp().numpy() * np.array(unlike)).sum(axis=1)
            expected = (similarity.scale.exp().numpy() * np.exp(exponent)).sum()
            assert found[i, j].item() == pytest.approx(expected, rel=1e-4)


def test_left_out_price_is_the_price_without_the_row(products):
    features, ln_price = products
    rows = np.arange(60)
    model = KernelModel.fit(SETTINGS, features[rows], ln_price[:60])
    gram = model.similarity(differences(features[rows], features[rows])).double().numpy()
    noise, known = float(model.similarity.noise.exp()), ln_price[:60] - ln_price[:60].mean()
    for left in (0, 17, 59):
        others = rows != left
        weights = np.linalg.solve(gram[np.ix_(others, others)] + noise * np.eye(59), known[others])
        expected = ln_price[:60].mean() + gram[left, others] @ weights
        assert model.left_out[left] == pytest.approx(expected, abs=2e-3)


def test_predictions_do_not_depend_on_the_slab(products, monkeypatch):
    features, ln_price = products
    model = KernelModel.fit(SETTINGS, features[np.arange(200)], ln_price[:200])
    asked = features[np.arange(200, 400)]
    whole = model.predict(asked)
    monkeypatch.setattr(kernel, "SLAB", 37)
    np.testing.assert_allclose(model.predict(asked), whole, rtol=1e-5)


def test_learning_lowers_the_left_out_error_and_finds_what_matters(products):
    features, ln_price = products

    def left_out_smape(similarity):
        gram = similarity(differences(features, features)) + similarity.noise.exp() * torch.eye(len(ln_price))
        inverse = torch.linalg.inv(gram)
        known = torch.from_numpy(ln_price - ln_price.mean()).float()
        left_out = ln_price - ((inverse @ known) / inverse.diagonal()).numpy()
        return smape(np.exp(ln_price), np.exp(left_out))

    amounts = len(features.compared_amounts)
    start = Similarity.start(5 + amounts, amounts, seed=0)
    learned = learn(TfidfSettings(model="kernel", kernel_steps=40), features, ln_price)
    assert left_out_smape(learned) < left_out_smape(start) - 3
    # the last comparison is the price itself with some noise: asked for far more than the length of a text
    assert learned.rate[:, -1].max() > learned.rate[:, -4].max() + 1


def test_kernel_refuses_more_rows_than_fit_in_memory(products, monkeypatch):
    features, ln_price = products
    monkeypatch.setattr(kernel, "LARGEST", 300)
    with pytest.raises(InputError, match="--model kernel: 400 rows"):
        MODELS["kernel"](SETTINGS, features, ln_price, features)
