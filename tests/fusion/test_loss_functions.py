import math

import numpy as np
import pytest
import torch

from contracts.errors import InputError
from fusion import loss_functions
from fusion.loss_functions import (
    LOSSES,
    PRICE_FLOOR,
    build_loss,
    ln_positive_price,
    positive_price,
    price_weight,
)


def log_prices(*prices: float) -> torch.Tensor:
    return torch.tensor(prices, dtype=torch.float64).log1p()


def smape_by_hand(price: np.ndarray, true_price: np.ndarray) -> np.ndarray:
    return 100 * np.abs(price - true_price) / ((np.abs(price) + np.abs(true_price)) / 2)


@pytest.mark.parametrize("name", ["smape", "smape_tanh", "weighted_smape"])
def test_smape_of_100_against_120(name):
    assert build_loss(name)(log_prices(100.0), log_prices(120.0)).item() == pytest.approx(18.1818, abs=1e-4)


@pytest.mark.parametrize("name", ["smape", "smape_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smape_equals_the_metric_on_every_positive_price(name, dtype):
    generator = np.random.default_rng(0)
    true_price = np.exp(generator.uniform(math.log(PRICE_FLOOR), math.log(5000), 500))
    price = np.maximum(true_price * np.exp(generator.normal(0, 1.5, 500)), PRICE_FLOOR)
    loss = build_loss(name)(*(torch.tensor(np.log1p(p), dtype=dtype) for p in (price, true_price)))
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
    loss = build_loss("weighted_smape")
    assert loss(log_prices(*price), log_prices(*true_price)).item() == pytest.approx(expected)
    assert expected != pytest.approx(smape_by_hand(price, true_price).mean(), rel=0.01)


def test_the_table_made_in_inference_mode_still_trains():
    loss_functions._bucket_tables.cache_clear()
    predicted, true = torch.zeros(2, requires_grad=True), torch.ones(2)
    with torch.inference_mode():
        build_loss("weighted_smape")(predicted, true)
    build_loss("weighted_smape")(predicted, true).backward()
    assert predicted.grad.abs().min() > 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("predicted", [-1e4, -20.0, -1.0, -1e-3, 0.0, 1e-6, 0.05, 5.0, 80.0, 1e4])
def test_every_loss_is_finite_for_any_real_prediction(name, predicted):
    log_price = torch.tensor([predicted], requires_grad=True)
    loss = build_loss(name)(log_price, torch.tensor([14.0]).log1p())
    loss.backward()
    assert loss.isfinite() and log_price.grad.isfinite().all() and loss >= 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("predicted", [-2.0, -1.0, -0.5, 0.0, 0.05, 0.5, 1.0])
def test_an_untrained_prediction_is_pulled_up(name, predicted):
    log_price = torch.tensor([predicted], requires_grad=True)
    build_loss(name)(log_price, torch.tensor([14.0]).log1p()).backward()
    assert log_price.grad.item() < -5e-4


def test_the_floor_is_smooth_monotone_and_exact_above():
    log_price = torch.linspace(-3, 3, 60_001, dtype=torch.float64, requires_grad=True)
    price = positive_price(log_price)
    (slope,) = torch.autograd.grad(price.sum(), log_price)
    assert (price > 0).all() and (slope > 0).all()
    assert slope.diff().abs().max() < 0.01, "a jump of the slope at the floor"
    above = log_price >= math.log1p(PRICE_FLOOR)
    torch.testing.assert_close(price[above], log_price[above].expm1())
    torch.testing.assert_close(price.log(), ln_positive_price(log_price))


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_costs_nothing(name):
    log_price = log_prices(0.01, 0.13, 5.0, 14.0, 3000.0).requires_grad_()
    loss = build_loss(name)(log_price, log_price.detach())
    loss.backward()
    assert loss == 0 and (log_price.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_agrees_with_finite_differences(name):
    true = log_prices(3.0, 7.0, 20.0, 45.0, 100.0, 500.0)
    predicted = torch.tensor([0.5, -0.4, 3.5, 6.0, 4.0, 0.05], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: build_loss(name)(p, true, row_weight=weight), predicted)


@pytest.mark.parametrize("name", LOSSES)
def test_row_weights_zero_out_rows_and_integers_repeat_them(name):
    loss = build_loss(name)
    predicted, true = log_prices(3.0, 20.0, 90.0), log_prices(4.0, 50.0, 20.0)
    weighted = loss(predicted, true, row_weight=torch.tensor([2.0, 0.0, 1.0]))
    repeat = [0, 0, 2]
    torch.testing.assert_close(weighted, loss(predicted[repeat], true[repeat]))


def test_focal_smape_by_hand():
    share = 20 / 220
    for gamma in (0.0, 1.0, 2.0):
        loss = build_loss("focal_smape", gamma=gamma)(log_prices(100.0), log_prices(120.0))
        assert loss.item() == pytest.approx(200 * share ** (1 + gamma))


def test_log_losses_by_hand():
    predicted, true = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 5.0])
    huber = (0.5 * 0.5**2 + (3.0 - 0.5)) / 2
    assert build_loss("log_l1")(predicted, true).item() == pytest.approx((0.5 + 3.0) / 2)
    assert build_loss("huber")(predicted, true).item() == pytest.approx(huber)
    assert build_loss("huber", delta=4.0)(predicted, true).item() == pytest.approx((0.125 + 4.5) / 2)
    smape = build_loss("smape")(predicted, true).item()
    both = build_loss("huber_smape", huber_weight=0.3, smape_weight=0.7)(predicted, true).item()
    assert both == pytest.approx(0.3 * huber + 0.7 * smape / 100)


def test_half_precision_is_computed_in_single():
    predicted, true = torch.tensor([2.0, 3.0]).bfloat16(), torch.tensor([2.5, 3.5]).bfloat16()
    loss = build_loss("smape")(predicted, true)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, build_loss("smape")(predicted.float(), true.float()))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_compile_without_a_graph_break(name):
    loss = build_loss(name)
    predicted, true = torch.rand(8), torch.rand(8) * 5
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(predicted, true), loss(predicted, true))


@pytest.mark.parametrize("name", LOSSES)
def test_a_column_against_a_row_is_refused(name):
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4,\)"):
        build_loss(name)(torch.zeros(4, 1), torch.zeros(4))


def test_wrong_names_and_settings_are_refused():
    with pytest.raises(InputError, match="no loss 'mse'.*weighted_smape, smape, .*huber_smape"):
        build_loss("mse")
    with pytest.raises(InputError, match="no setting alpha: it has gamma"):
        build_loss("focal_smape", alpha=1.0)
    with pytest.raises(InputError, match="no setting row_weight: it has none"):
        build_loss("log_l1", row_weight=1.0)
    for setting in ({"delta": 0.0}, {"delta": -1.0}):
        with pytest.raises(InputError, match="delta"):
            build_loss("huber", **setting)
