import numpy as np
import pytest

from contracts.splits import roles
from training.alignment import ALIGNMENT_ROWS, Alignment, alignment_rows


@pytest.mark.parametrize("shift", [True, False])
def test_alignment_recovers_a_rotation_and_a_shift(shift):
    rng = np.random.default_rng(0)
    source = rng.normal(size=(200, 8)) * rng.uniform(0.5, 3, size=8)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    target = source @ rotation + shift * rng.normal(size=8)
    alignment = Alignment.fit(source[:100], target[:100], shift=shift)
    np.testing.assert_allclose(alignment(source[100:]), target[100:], atol=1e-8)
    np.testing.assert_allclose(alignment.rotation @ alignment.rotation.T, np.eye(8), atol=1e-10)
    np.testing.assert_allclose(alignment.inverse(target[100:]), source[100:], atol=1e-8)


def test_without_a_shift_unit_vectors_stay_unit_vectors():
    rng = np.random.default_rng(0)
    source, target = rng.normal(loc=1.0, size=(2, 50, 6))
    source /= np.linalg.norm(source, axis=1, keepdims=True)
    moved = Alignment.fit(source, target, shift=False)(source)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, atol=1e-10)


@pytest.mark.parametrize("rows", [0, 5])
def test_what_few_rows_leave_open_stays_as_it_is(rows):
    """Five rows say nothing of most directions of 32, and equal encoders must not be turned there."""
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(rows, 32)).astype(np.float32)
    alignment = Alignment.fit(seen, seen, shift=False)
    other = rng.normal(size=(10, 32))
    np.testing.assert_allclose(alignment(other), other, atol=1e-4)


def test_rows_that_both_encoders_were_fitted_on():
    fold = np.arange(10).repeat(500)
    rows = alignment_rows(fold, roles(1), np.random.default_rng(0))
    assert len(rows) == len(set(rows)) == ALIGNMENT_ROWS
    # hold-out 1 validates on folds 2 and 3 and stops on 4; the model of all rows stops on 0
    assert set(fold[rows]) == {1, 5, 6, 7, 8, 9}
    few = alignment_rows(np.arange(10), roles(1), np.random.default_rng(0))
    assert few.tolist() == [1, 5, 6, 7, 8, 9]
