import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contracts import smape as metric
from training.smape_loss import MIN_LOG_PRICE, huber_smape, ln_price, positive_price, smape_of_ln, smape_terms

PRICES = np.array([0.13, 0.5, 4.99, 14.0, 200.0, 5000.0])


def test_terms_equal_the_metric_for_positive_prices():
    predicted = np.roll(PRICES, 1)
    terms = smape_terms(*(torch.from_numpy(np.log1p(price)) for price in (predicted, PRICES)))
    np.testing.assert_allclose(terms, metric.smape_terms(PRICES, predicted), rtol=1e-9)
    np.testing.assert_allclose(metric.smape_of_ln(np.log(predicted / PRICES)), terms, rtol=1e-9)


def test_a_hundred_against_a_hundred_and_twenty():
    assert smape_of_ln(torch.tensor(math.log(1.2))).item() == pytest.approx(18.1818, abs=1e-4)


def test_a_price_below_zero_still_feels_its_gradient():
    log_price = torch.tensor([-3.0, -0.5, 0.01], requires_grad=True)
    smape_terms(log_price, torch.full((3,), math.log1p(14.0))).sum().backward()
    assert (log_price.grad < 0).all()
    assert (positive_price(log_price) > 0).all()


def test_no_overflow_at_any_size():
    far = torch.tensor([500.0, -500.0])
    assert torch.isfinite(ln_price(far)).all()
    assert smape_terms(far, torch.zeros(2) + 1).max() <= 200


def test_huber_and_smape_are_added_with_their_weights():
    predicted, true = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.5])
    expected = (
        0.7 * F.huber_loss(predicted, true, delta=0.3) + 0.5 * smape_terms(predicted, true).mean() / 100
    )
    actual = huber_smape(predicted, true, huber_weight=0.7, smape_weight=0.5, delta=0.3)
    assert actual.item() == pytest.approx(expected.item())


def test_the_lowest_price_is_one_cent():
    assert math.expm1(MIN_LOG_PRICE) == pytest.approx(0.01)
