import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn

from clip_finetune.loss import accumulate_backward, contrastive_loss, price_loss
from contracts.smape import smape
from training.processes import reduce_gradients


def test_contrastive_loss_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits, scale 2: picture 0 -> (2, 1.2), picture 1 -> (0, 1.6); text 0 -> (2, 0), text 1 -> (1.2, 1.6)
    to_text = [math.log(1 + math.exp(1.2 - 2)), math.log(1 + math.exp(0 - 1.6))]
    to_image = [math.log(1 + math.exp(0 - 2)), math.log(1 + math.exp(1.2 - 1.6))]
    expected = (sum(to_text) / 2 + sum(to_image) / 2) / 2
    assert contrastive_loss(image, text, torch.tensor(2.0)).item() == pytest.approx(expected, rel=1e-6)


def test_smape_loss_is_the_metric():
    price, predicted = np.array([0.13, 5.0, 14.0, 2500.0]), np.array([1.0, 4.0, 14.0, 100.0])
    loss = price_loss(torch.tensor(np.log1p(predicted)), torch.tensor(np.log1p(price)), "smape")
    assert 100 * loss.item() == pytest.approx(smape(price, predicted), rel=1e-9)


def test_smape_loss_stays_finite_at_the_edges():
    predicted = torch.tensor([-3.0, 0.0, 90.0], requires_grad=True)
    loss = price_loss(predicted, torch.tensor([1.0, 1.0, 1.0]), "smape")
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(predicted.grad).all()


def test_huber_by_hand():
    loss = price_loss(torch.tensor([1.5, 3.0]), torch.tensor([1.0, 1.0]), "huber")
    assert loss.item() == pytest.approx((0.5 * 0.5**2 + (2 - 0.5)) / 2)


class Towers(nn.Module):
    """The smallest thing with two encoders, a scale and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.head = nn.Linear(6, 4), nn.Linear(5, 4), nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def encode(self, batch):
        return (
            F.normalize(tower(batch[name]), dim=-1) for tower, name in ((self.image, "x"), (self.text, "t"))
        )

    def backward(self, batches):
        log_price = torch.cat([batch["p"] for batch in batches])

        def objective(image, text):
            price = price_loss(self.head(image).squeeze(-1), log_price, "huber")
            return contrastive_loss(image, text, self.scale.exp()) + price

        self.zero_grad()
        return accumulate_backward(lambda batch: tuple(self.encode(batch)), batches, objective)

    def gradients(self):
        return {name: parameter.grad.clone() for name, parameter in self.named_parameters()}


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(rows, *width, generator=draw) for name, width in (("x", [6]), ("t", [5]), ("p", []))
    }


def part(batch, rows):
    return {name: values[rows] for name, values in batch.items()}


@pytest.mark.parametrize("cuts", [[4, 4], [3, 3, 2]])
def test_accumulated_batches_give_the_gradient_of_one(cuts):
    model, batch = Towers(), batch_of(8)
    whole = model.backward([batch])
    expected = model.gradients()
    parts = [part(batch, rows) for rows in torch.arange(8).split(cuts)]
    assert torch.allclose(model.backward(parts), whole)
    for name, gradient in model.gradients().items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name
    # plain accumulation would give another gradient, so the comparison above means something
    model.backward([parts[0]])
    assert not torch.allclose(model.image.weight.grad, expected["image.weight"], atol=1e-3)


def one_process(rank: int, folder: str) -> None:
    """Process `rank` of two: every other pair, in two batches; its averaged gradient goes to a file."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, batch = Towers(), part(batch_of(8), slice(rank, None, 2))
    loss = model.backward([part(batch, slice(0, 2)), part(batch, slice(2, 4))])
    distributed.all_reduce(loss)
    reduce_gradients(model.parameters(), "mean")
    torch.save({"loss": loss / 2, **model.gradients()}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one_batch(tmp_path):
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    model = Towers()
    expected = {"loss": model.backward([batch_of(8)]), **model.gradients()}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-6), (rank, name)


if __name__ == "__main__":
    one_process(int(sys.argv[1]), sys.argv[2])
