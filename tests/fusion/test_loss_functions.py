import math

import numpy as np
import pytest
import torch

from fusion.all_embeddings import train
from fusion.loss_functions import LOSSES, bucket_tables, focal_smape, price_weight
from training.smape_loss import PRICE_FLOOR, ln_price, positive_price, smape_terms


def log_prices(*prices: float) -> torch.Tensor:
    return torch.tensor(prices, dtype=torch.float64).log1p()


def smape_by_hand(price: np.ndarray, true_price: np.ndarray) -> np.ndarray:
    return 100 * np.abs(price - true_price) / ((np.abs(price) + np.abs(true_price)) / 2)


@pytest.mark.parametrize("name", ["smape", "smape_tanh", "weighted_smape"])
def test_smape_of_100_against_120(name):
    assert LOSSES[name](log_prices(100.0), log_prices(120.0)).item() == pytest.approx(18.1818, abs=1e-4)


@pytest.mark.parametrize("name", ["smape", "smape_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smape_equals_the_metric_on_every_positive_price(name, dtype):
    generator = np.random.default_rng(0)
    true_price = np.exp(generator.uniform(math.log(PRICE_FLOOR), math.log(5000), 500))
    price = np.maximum(true_price * np.exp(generator.normal(0, 1.5, 500)), PRICE_FLOOR)
    loss = LOSSES[name](*(torch.tensor(np.log1p(p), dtype=dtype) for p in (price, true_price)))
    assert loss.item() == pytest.approx(smape_by_hand(price, true_price).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("price", "weight"),
    [
        *((0.13, 10), (4.99, 10), (5.00, 8), (9.99, 8), (10.00, 6), (29.99, 6), (30.00, 4), (59.99, 4)),
        *((60.00, 2), (199.99, 2), (200.00, 1), (2800.0, 1)),
    ],
)
def test_each_price_bucket_has_its_weight(price, weight):
    for log_price in (
        torch.tensor([price]).log1p(),
        torch.tensor([math.log1p(price)]),
        log_prices(price),
        torch.tensor(np.log1p(np.float32([price]))),
    ):
        assert price_weight(log_price).tolist() == [weight]


@pytest.mark.parametrize(("price", "weight"), [(5.0, 8), (10.0, 6), (30.0, 4), (60.0, 2), (200.0, 1)])
def test_rounding_moves_no_price_off_its_threshold(price, weight):
    rounded = torch.tensor([price]).log1p()
    for toward in (-torch.inf, torch.inf):
        assert price_weight(torch.nextafter(rounded, torch.tensor(toward))).tolist() == [weight]


def test_weighted_smape_is_the_weighted_mean_by_true_price():
    true_price = np.array([3.0, 7.0, 20.0, 45.0, 100.0, 500.0])
    price = true_price * np.array([2.0, 0.7, 1.5, 1.1, 0.2, 3.0])
    expected = np.average(smape_by_hand(price, true_price), weights=[10, 8, 6, 4, 2, 1])
    loss = LOSSES["weighted_smape"](log_prices(*price), log_prices(*true_price))
    assert loss.item() == pytest.approx(expected)
    assert expected != pytest.approx(smape_by_hand(price, true_price).mean(), rel=0.01)


def test_weights_that_were_first_needed_in_inference_mode_still_train():
    bucket_tables.cache_clear()
    predicted = torch.zeros(2, requires_grad=True)
    true = torch.ones(2)
    with torch.inference_mode():
        LOSSES["weighted_smape"](predicted, true)
    LOSSES["weighted_smape"](predicted, true).backward()
    assert predicted.grad.abs().min() > 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("predicted", [-1e4, -20.0, -1.0, -1e-3, 0.0, 1e-6, 0.05, 5.0, 80.0, 1e4])
def test_every_loss_is_finite_for_any_real_prediction(name, predicted):
    log_price = torch.tensor([predicted], requires_grad=True)
    loss = LOSSES[name](log_price, torch.tensor([14.0]).log1p())
    loss.backward()
    assert loss.isfinite() and log_price.grad.isfinite().all() and loss >= 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("predicted", [-2.0, -1.0, -0.5, 0.0, 0.05, 0.5, 1.0])
def test_an_untrained_prediction_is_pulled_up(name, predicted):
    log_price = torch.tensor([predicted], requires_grad=True)
    LOSSES[name](log_price, torch.tensor([14.0]).log1p()).backward()
    assert log_price.grad.item() < -5e-4


def test_the_floor_is_smooth_monotone_and_exact_above():
    log_price = torch.linspace(-3, 3, 60_001, dtype=torch.float64, requires_grad=True)
    price = positive_price(log_price)
    (slope,) = torch.autograd.grad(price.sum(), log_price)
    assert (price > 0).all() and (slope > 0).all()
    assert slope.diff().abs().max() < 0.01, "a jump of the slope at the floor"
    above = log_price >= math.log1p(PRICE_FLOOR)
    torch.testing.assert_close(price[above], log_price[above].expm1())
    torch.testing.assert_close(price.log(), ln_price(log_price))


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_costs_nothing(name):
    log_price = log_prices(0.01, 0.13, 5.0, 14.0, 3000.0).requires_grad_()
    loss = LOSSES[name](log_price, log_price.detach())
    loss.backward()
    assert loss == 0 and (log_price.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_agrees_with_finite_differences(name):
    true = log_prices(3.0, 7.0, 20.0, 45.0, 100.0, 500.0)
    predicted = torch.tensor([0.5, -0.4, 3.5, 6.0, 4.0, 0.05], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: LOSSES[name](p, true), predicted)


def test_focal_smape_by_hand():
    share = 20 / 220
    predicted, true = log_prices(100.0), log_prices(120.0)
    for gamma in (0.0, 1.0, 2.0):
        assert focal_smape(predicted, true, gamma=gamma).item() == pytest.approx(200 * share ** (1 + gamma))
    assert LOSSES["focal_smape"](predicted, true).item() == pytest.approx(200 * share**2)


def test_log_losses_by_hand():
    predicted, true = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 5.0])
    huber = (0.5 * 0.5**2 + (3.0 - 0.5)) / 2
    assert LOSSES["log_l1"](predicted, true).item() == pytest.approx((0.5 + 3.0) / 2)
    assert LOSSES["huber"](predicted, true).item() == pytest.approx(huber)
    expected = huber + smape_terms(predicted, true).mean().item() / 100
    assert LOSSES["huber_smape"](predicted, true).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_single(name):
    predicted, true = torch.tensor([2.0, 3.0]).bfloat16(), torch.tensor([2.5, 3.5]).bfloat16()
    loss = LOSSES[name](predicted, true)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES[name](predicted.float(), true.float()))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_compile_without_a_graph_break(name):
    loss = LOSSES[name]
    predicted, true = torch.rand(8), torch.rand(8) * 5
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(predicted, true), loss(predicted, true))


@pytest.mark.parametrize("name", LOSSES)
def test_a_column_against_a_row_is_refused(name):
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4,\)"):
        LOSSES[name](torch.zeros(4, 1), torch.zeros(4))


def test_an_unknown_loss_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.main(["--loss", "mse"])
    assert "weighted_smape" in capsys.readouterr().err
