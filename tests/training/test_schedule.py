import pytest

from training.schedule import learning_rate_factor


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_warm_up_rises_in_a_line_and_the_decay_ends_above_zero(decay):
    factors = [learning_rate_factor(step, 100, 0.1, decay) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == 1.0
    assert all(before >= after for before, after in zip(factors[10:], factors[11:], strict=False))
    assert 0 < factors[-1] < 0.02


def test_halfway_through_the_decay_both_forms_are_at_one_half():
    assert learning_rate_factor(55, 100, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(55, 100, 0.1, "linear") == pytest.approx(0.5)


def test_a_short_run_still_takes_its_first_step():
    assert learning_rate_factor(0, 1, 0.0) == 1.0
    assert learning_rate_factor(0, 3, 0.1) == 1.0
