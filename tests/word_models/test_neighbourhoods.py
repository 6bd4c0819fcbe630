"""The kernel beyond its exact form: neighbourhoods are small exact regressions, and nothing else changes."""

import numpy as np
import pytest
import torch

from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.workspace import Workspace
from word_models.compared import ComparedRows
from word_models.config import WordModelSettings
from word_models.features import build_features
from word_models.kernel import KernelModel
from word_models.neighbourhoods import Sizes, nearest_centre, neighbourhoods
from word_models.similarity import AMOUNTS_IN_PLACES, learn, places

SETTINGS = WordModelSettings(model="kernel", kernel_steps=15)
SMALL = Sizes(exact=0, home=20, members=90)
ROWS = 300


@pytest.fixture(scope="module")
def products(sample_workspace):
    """Features and ln price of 400 rows."""
    workspace = Workspace(sample_workspace)
    table = workspace.prepared("train")
    features = build_features(table, workspace.prepared("test"))["train"]
    return features, np.log(table["price"].to_numpy())


@pytest.fixture(scope="module")
def learned(products):
    """What is compared of the first ROWS rows, and a similarity that was learned from them."""
    features, ln_price = products
    compared = ComparedRows.of(features[np.arange(ROWS)])
    return learn(SETTINGS, compared, ln_price[:ROWS]), compared


def fit(learned, ln_price, sizes):
    similarity, compared = learned
    return KernelModel.with_similarity(similarity, compared, ln_price[:ROWS], sizes=sizes, seed=0)


def test_each_row_is_at_home_once_and_neighbourhoods_are_bounded(learned):
    where = places(*learned)
    found = neighbourhoods(where, SMALL, seed=0)
    at_home = np.concatenate([one.members[-one.home :] for one in found])
    assert sorted(at_home) == list(range(ROWS))
    for one in found:
        assert len(one.members) == len(set(one.members)) == SMALL.members
    # those at home are nearer to their own centre than to any other
    with_centre = [one for one in found if one.centre is not None]
    centres = np.stack([one.centre for one in with_centre])
    assert len(centres) > 5
    for number, one in enumerate(with_centre):
        assert (nearest_centre(where[one.members[-one.home :]], centres) == number).all()


def test_members_are_the_rows_nearest_to_the_centre(learned):
    where = places(*learned)
    for one in neighbourhoods(where, SMALL, seed=0):
        if one.centre is None:
            continue
        others = one.members[: -one.home]
        distance = np.linalg.norm(where - one.centre, axis=1)
        outside = np.delete(np.arange(ROWS), one.members)
        assert distance[others].max() <= distance[outside].min() + 1e-5


def test_equal_rows_do_not_make_a_neighbourhood_too_large(learned):
    where = places(*learned).copy()
    where[:200] = where[0]
    found = neighbourhoods(where, SMALL, seed=0)
    assert sorted(np.concatenate([one.members[-one.home :] for one in found])) == list(range(ROWS))
    assert max(len(one.members) for one in found) == SMALL.members
    of_the_equal = [one for one in found if (one.members[-one.home :] < 200).any()]
    assert len(of_the_equal) >= 4 and sum(one.centre is not None for one in of_the_equal) == 1


def test_places_are_as_far_apart_as_views_and_weaker_amounts_differ(learned):
    similarity, compared = learned
    where = torch.from_numpy(places(similarity, compared)).double()
    weight = similarity.scale.exp() / similarity.scale.exp().sum()
    rate = weight @ similarity.rate.exp()
    rate[-len(compared.amounts) :] *= AMOUNTS_IN_PLACES**2
    blocks = len(compared.words)
    expected = torch.einsum("c,cmn->mn", rate[blocks:], compared.differences(compared)[blocks:])
    found = 0.5 * torch.cdist(where, where).square()
    known = np.all([np.linalg.norm(view, axis=1) > 0.5 for view in compared.views], axis=0)
    torch.testing.assert_close(
        found[known][:, known].float(), expected[known][:, known], atol=1e-4, rtol=1e-3
    )


def test_neighbourhoods_of_all_rows_are_the_exact_form(products, learned):
    features, ln_price = products
    exact = fit(learned, ln_price, Sizes(exact=ROWS))
    whole = fit(learned, ln_price, Sizes(exact=0, home=20, members=ROWS))
    assert len(exact.members) == 1 and len(whole.members) > 5
    asked = features[np.arange(ROWS, 400)]
    np.testing.assert_allclose(whole.left_out.ln_price, exact.left_out.ln_price, atol=1e-3)
    np.testing.assert_allclose(whole.left_out.surroundings, exact.left_out.surroundings, atol=2e-3)
    np.testing.assert_allclose(whole.estimate(asked).ln_price, exact.estimate(asked).ln_price, atol=1e-3)
    np.testing.assert_allclose(
        whole.estimate(asked).surroundings, exact.estimate(asked).surroundings, atol=2e-3
    )


def test_left_out_price_is_the_price_without_the_row(products, learned):
    """By a regression of the same neighbourhood that is fitted again without the row."""
    _, ln_price = products
    similarity, compared = learned
    model = fit(learned, ln_price, SMALL)
    mean = ln_price[:ROWS].mean()
    noise = float(similarity.noise.exp())
    for one in neighbourhoods(places(similarity, compared), SMALL, seed=0)[:4]:
        members = compared[one.members]
        gram = similarity(members.differences(members)).double().numpy()
        known = ln_price[one.members] - mean
        for left in range(SMALL.members - one.home, SMALL.members):
            others = np.arange(SMALL.members) != left
            weights = np.linalg.solve(
                gram[np.ix_(others, others)] + noise * np.eye(others.sum()), known[others]
            )
            expected = mean + gram[left, others] @ weights
            assert model.left_out.ln_price[one.members[left]] == pytest.approx(expected, abs=2e-3)


def test_a_new_row_is_priced_by_the_nearest_neighbourhood_alone(products, learned):
    """The same alone, in another order, and with many others."""
    features, ln_price = products
    model = fit(learned, ln_price, SMALL)
    asked = np.arange(ROWS, 400)
    together = model.estimate(features[asked])
    backwards = model.estimate(features[asked[::-1]])
    np.testing.assert_allclose(backwards.ln_price[::-1], together.ln_price, atol=1e-9)
    for at in (0, 50, 99):
        alone = model.estimate(features[asked[[at]]])
        assert alone.ln_price[0] == pytest.approx(together.ln_price[at], abs=1e-5)
        np.testing.assert_allclose(alone.surroundings[0], together.surroundings[at], atol=1e-4)


@pytest.mark.parametrize("sizes", [SMALL, Sizes(exact=ROWS)], ids=["neighbourhoods", "exact"])
def test_a_held_out_price_moves_no_held_out_prediction(products, sizes):
    """Learning, regression and surroundings see the fitted prices only; one of these does move predictions."""
    features, ln_price = products
    held_out = np.arange(400) >= ROWS

    def predicted(prices):
        model = KernelModel.fit(SETTINGS, features[~held_out], prices[~held_out], sizes=sizes)
        estimate = model.estimate(features[held_out])
        return np.column_stack([estimate.ln_price, estimate.surroundings])

    before = predicted(ln_price)
    dearer = ln_price.copy()
    dearer[ROWS] += np.log(7)
    np.testing.assert_array_equal(predicted(dearer), before)
    dearer[0] += np.log(7)
    assert np.abs(predicted(dearer) - before).max() > 0.01


def test_a_left_out_row_sees_its_own_price_only_in_the_mean_of_all(products, learned):
    _, ln_price = products
    before = fit(learned, ln_price, SMALL).left_out
    dearer = ln_price.copy()
    dearer[7] += np.log(7)
    after = fit(learned, dearer, SMALL).left_out
    # the mean of 300 prices moves by ln 7 / 300, and the price of a row unlike all others with it
    assert abs(after.ln_price[7] - before.ln_price[7]) <= np.log(7) / ROWS + 1e-3


def test_a_saved_model_of_neighbourhoods_estimates_the_same(products, learned, tmp_path):
    features, ln_price = products
    model = fit(learned, ln_price, SMALL)
    model.save(tmp_path)
    loaded = KernelModel.load(tmp_path)
    asked = features[np.arange(ROWS, 400)]
    found = loaded.estimate(asked)
    expected = model.estimate(asked)
    np.testing.assert_allclose(found.ln_price, expected.ln_price, atol=2e-5)
    np.testing.assert_allclose(found.surroundings, expected.surroundings, atol=1e-4)


def test_neighbourhoods_of_other_places_are_refused(products, learned, tmp_path):
    """A new row would be priced far from its neighbours. A single neighbourhood needs no places."""
    _, ln_price = products
    for sizes, refused in ((SMALL, True), (Sizes(exact=ROWS), False)):
        fit(learned, ln_price, sizes).save(tmp_path)
        content = read_json(tmp_path / "kernel.json")
        del content["places"]
        write_json(tmp_path / "kernel.json", content)
        if refused:
            with pytest.raises(InputError, match="kernel.json: neighbourhoods of an earlier version"):
                KernelModel.load(tmp_path)
        else:
            assert len(KernelModel.load(tmp_path).rows) == ROWS
