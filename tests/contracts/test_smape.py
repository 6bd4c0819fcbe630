import numpy as np
import pytest

from contracts.smape import best_constant, price_bin, smape, smape_by_group, smape_terms, smape_with_error


def test_hand_numbers():
    assert smape([100], [120]) == pytest.approx(18.1818, abs=1e-4)
    assert smape([120], [100]) == pytest.approx(18.1818, abs=1e-4)  # symmetric
    assert smape([10, 10], [10, 30]) == pytest.approx(50)
    assert smape([5], [0]) == 200  # neither halved nor doubled at the far end
    assert smape([0], [0]) == 0


def test_tanh_identity():
    generator = np.random.default_rng(0)
    actual, predicted = np.exp(generator.normal(2.5, 1.5, (2, 1000)))
    expected = 200 * np.tanh(np.abs(np.log(predicted) - np.log(actual)) / 2)
    np.testing.assert_allclose(smape_terms(actual, predicted), expected, rtol=1e-9)


def test_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="finite"):
        smape([1, np.nan], [1, 1])
    with pytest.raises(ValueError, match="shape"):
        smape([1, 2], [1])
    with pytest.raises(ValueError, match="no rows"):
        smape([], [])


def test_standard_error_matches_repeated_draws():
    generator = np.random.default_rng(1)
    draws = [np.exp(generator.normal(0, 1, (2, 400))) for _ in range(300)]
    errors = [smape_with_error(actual, predicted)[1] for actual, predicted in draws]
    spread = np.std([smape(actual, predicted) for actual, predicted in draws])
    assert np.mean(errors) == pytest.approx(spread, rel=0.12)


def test_best_constant_beats_its_neighbours():
    price = np.exp(np.random.default_rng(2).normal(2.6, 1, 2000))
    best = best_constant(price)
    score = smape(price, np.full(2000, best))
    assert score < smape(price, np.full(2000, best * 1.3))
    assert score < smape(price, np.full(2000, best / 1.3))


def test_bins_and_groups():
    price = np.array([0.5, 4.99, 5, 29, 30, 199, 200, 3000])
    assert price_bin(price).tolist() == [
        "$0-5", "$0-5", "$5-10", "$10-30", "$30-60", "$60-200", "$200+", "$200+",
    ]  # fmt: skip
    table = smape_by_group(price, price * 2, {"half": ["a"] * 4 + ["b"] * 4})
    assert table["group"].tolist() == ["all", "a", "b"]
    assert table["rows"].tolist() == [8, 4, 4]
    np.testing.assert_allclose(table["smape"], 200 / 3)
    np.testing.assert_allclose(table["bias"], np.log(2))
