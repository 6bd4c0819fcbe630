import math

import numpy as np
import pytest
import torch

from contracts.smape import smape
from qwen3_finetune.loss import ln_price, price_loss, smape_loss


def log1p(*prices):
    return torch.log1p(torch.tensor(prices, dtype=torch.float64))


def test_ln_price_from_log1p():
    prices = torch.tensor([0.05, 1.0, 14.0, 5000.0], dtype=torch.float64)
    torch.testing.assert_close(ln_price(torch.log1p(prices)), torch.log(prices))
    assert ln_price(torch.tensor([-3.0, 400.0])).tolist() == pytest.approx([math.log(0.01), 400.0], rel=1e-4)


def test_smape_loss_is_the_metric():
    assert smape_loss(log1p(120.0), log1p(100.0)).item() == pytest.approx(0.1818, abs=1e-4)
    rng = np.random.default_rng(0)
    actual, predicted = rng.lognormal(2.6, 1, (2, 200))
    loss = smape_loss(log1p(*predicted), log1p(*actual)).item()
    assert 100 * loss == pytest.approx(smape(actual, predicted))


def test_price_loss_by_hand():
    predicted, actual = torch.tensor([2.0, 5.0]), torch.tensor([2.4, 3.0])
    huber = (0.5 * 0.4**2 + (2.0 - 0.5)) / 2  # the second error, 2, lies beyond delta 1
    weights = {"huber_delta": 1.0}
    assert price_loss(predicted, actual, huber_weight=1, smape_weight=0, **weights).item() == pytest.approx(
        huber
    )
    both = price_loss(predicted, actual, huber_weight=3, smape_weight=0.5, **weights).item()
    assert both == pytest.approx(3 * huber + 0.5 * smape_loss(predicted, actual).item())


def test_gradient_is_finite_for_absurd_predictions():
    predicted = torch.tensor([-50.0, 0.0, 80.0], requires_grad=True)
    loss = price_loss(predicted, torch.full((3,), 2.7), huber_weight=1.0, smape_weight=1.0, huber_delta=1.0)
    loss.backward()
    assert torch.isfinite(predicted.grad).all() and predicted.grad[0] < 0 < predicted.grad[2]
