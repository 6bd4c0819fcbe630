import pytest
import torch

from contracts.errors import InputError
from training.best_weights import BestWeights


def test_the_best_epoch_comes_back_after_training_went_on():
    live = {"w": torch.zeros(2)}
    best = BestWeights(live)
    for epoch, score in enumerate([60.0, 50.0, 55.0, float("nan")], 1):
        live["w"].fill_(epoch)
        assert best.offer(score, epoch) == (epoch <= 2)
    assert (best.score, best.epoch) == (50.0, 2)
    best.load()
    assert live["w"].tolist() == [2, 2]


def test_higher_may_be_better():
    live = {"w": torch.zeros(1)}
    best = BestWeights(live, higher_is_better=True)
    assert best.offer(0.8, 1)
    assert not best.offer(0.7, 2)


def test_a_checkpoint_holds_both_sets():
    live = {"w": torch.ones(1)}
    best = BestWeights(live)
    best.offer(50.0, 1)
    live["w"].fill_(7)
    tensors, state = best.tensors(), best.state()

    other = {"w": torch.zeros(1)}
    resumed = BestWeights(other)
    resumed.restore({name: tensor.clone() for name, tensor in tensors.items()}, state)
    assert other["w"].item() == 7
    assert not resumed.offer(51.0, 2)
    resumed.load()
    assert other["w"].item() == 1
    with pytest.raises(InputError, match="lacks w"):
        resumed.restore({"w": torch.zeros(1)}, state)


def test_live_weights_may_need_a_gradient():
    model = torch.nn.Linear(2, 1)
    best = BestWeights(dict(model.named_parameters()))
    best.offer(1.0, 1)
    with torch.no_grad():
        model.weight.fill_(9)
    best.load()
    assert not (model.weight == 9).any()
