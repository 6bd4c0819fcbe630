import itertools

import numpy as np
import pytest

from product_matching.resolve import duplicate_groups, greedy, one_to_one


def test_one_to_one_gives_up_a_good_pair_for_a_better_whole():
    rows = np.array([[0, 0], [0, 1], [1, 0]])
    probability = np.array([0.95, 0.9, 0.9])
    # left 0 prefers right 0, but then left 1 has nothing
    assert one_to_one(rows, probability, 0.5).tolist() == [False, True, True]
    assert greedy(rows, probability, 0.5).tolist() == [True, False, True]


def test_one_to_one_is_the_best_of_all_assignments():
    rng = np.random.default_rng(0)
    rows = np.array(list(itertools.product(range(4), range(4))))
    for _ in range(20):
        probability = rng.uniform(0.05, 0.95, len(rows))
        chosen = one_to_one(rows, probability, 0.5)
        assert len(set(rows[chosen, 0])) == len(set(rows[chosen, 1])) == chosen.sum()
        gain = np.log(probability / (1 - probability))
        best = max(
            sum(max(gain[4 * left + right], 0) for left, right in enumerate(order))
            for order in itertools.permutations(range(4))
        )
        assert gain[chosen].sum() == pytest.approx(best)
        assert (probability[chosen] >= 0.5).all()


def test_nothing_above_the_threshold_matches_nothing():
    rows = np.array([[0, 0], [1, 1]])
    assert not one_to_one(rows, np.array([0.1, 0.2]), 0.5).any()
    assert not one_to_one(np.zeros((0, 2), int), np.zeros(0), 0.5).any()


def test_duplicates_are_connected_and_capped():
    rows = np.array([[0, 1], [1, 2], [2, 3], [4, 5]])
    probability = np.array([0.9, 0.8, 0.7, 0.4])
    group, refused = duplicate_groups(6, rows, probability, 0.5, most=10)
    assert group.tolist() == [0, 0, 0, 0, 1, 2] and refused == 0
    group, refused = duplicate_groups(6, rows, probability, 0.5, most=3)
    # the least probable pair of the chain is the one that is not joined
    assert group.tolist() == [0, 0, 0, 1, 2, 3] and refused == 1
