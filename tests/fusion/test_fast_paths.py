"""Each fast path of the fusion code against the plain way of computing the same."""

import copy
import functools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fusion.all_embeddings.config import AllEmbeddingsSettings
from fusion.all_embeddings.model import AllEmbeddings
from fusion.blocks import Dropout, EmbeddingBranch
from fusion.dataset import FusionTable
from fusion.int8 import int8_copy, plain_linears
from fusion.loop import epoch_rows, hide_modalities, predict, train_epoch
from fusion.step import TrainingStep
from fusion.target import Target

WIDTHS = {"clip_image": 12, "siglip_image": 10, "siglip_text": 8, "qwen_text": 11}


def make_settings(**changes):
    defaults = {"width": 32, "heads": 2, "dropout": 0.0, "batch_size": 32, "device": "cpu", "lr": 3e-3}
    return AllEmbeddingsSettings(**{**defaults, **changes})


@pytest.fixture
def table():
    """100 rows whose embeddings hold the log price; a tenth of the entries is missing."""
    generator = torch.Generator().manual_seed(0)
    log_price = 2.6 + torch.randn(100, generator=generator)
    valid = torch.rand(100, 4, generator=generator) > 0.1
    embeddings = {}
    for column, (name, width) in enumerate(WIDTHS.items()):
        matrix = log_price[:, None] * torch.randn(width, generator=generator)
        embeddings[name] = (matrix + torch.randn(100, width, generator=generator)) * valid[:, column, None]
    return FusionTable.of(pd.DataFrame({"price": np.expm1(log_price.numpy())}), embeddings, valid)


def model_and_target(table, settings):
    torch.manual_seed(0)
    target = Target.of(settings, table.log_price)
    model = AllEmbeddings(settings, WIDTHS)
    model.set_output_bias(target.output_bias)
    return model.to(table.valid.device), target


def assert_same_weights(model, other):
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_take_equals_collated_rows(table):
    index = torch.tensor([99, 0, 7, 7, 42])
    embeddings, valid = table.take(index)
    for name, matrix in table.embeddings.items():
        assert torch.equal(embeddings[name], torch.stack([matrix[row] for row in index]))
    assert torch.equal(valid, torch.stack([table.valid[row] for row in index]))


@pytest.mark.parametrize("depth", [1, 2])
def test_branch_scales_behind_the_product(depth):
    torch.manual_seed(0)
    branch = EmbeddingBranch(d_in=9, d_out=6, dropout=0.0, depth=depth, hidden=7)
    branch.scale.data.fill_(1.7)
    plain = copy.deepcopy(branch)
    x = torch.randn(5, 9)
    ours, expected = branch(x), plain.layers(plain.scale * x)
    torch.testing.assert_close(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), other in zip(branch.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", [(3, 1), (7, 1001), (2, 3, 500)])
@pytest.mark.parametrize("chance", [0.25, 0.9])
def test_dropout_scales_what_it_keeps(shape, chance):
    torch.manual_seed(0)
    x = torch.full(shape, 2.0, requires_grad=True)
    out = Dropout(chance)(x)
    out.sum().backward()
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 2 / (1 - chance)))
    torch.testing.assert_close(x.grad, kept / (1 - chance))


@pytest.mark.parametrize(("chance", "lanes"), [(0.3, 4), (0.25, 8)])
def test_dropout_keeps_each_element_with_the_same_chance(chance, lanes):
    torch.manual_seed(0)
    kept = (Dropout(chance)(torch.ones(400_000)) != 0).float().view(-1, lanes)
    # the lanes share one random number; five standard errors
    assert kept.mean(0).tolist() == pytest.approx([1 - chance] * lanes, abs=0.0023 * lanes**0.5)
    assert (torch.corrcoef(kept.T) - torch.eye(lanes)).abs().max() < 0.008 * lanes**0.5


def test_dropout_at_rest_changes_nothing():
    x = torch.randn(4, 5)
    assert Dropout(0.3).eval()(x) is x and Dropout(0.0)(x) is x


def test_epoch_equals_a_plain_loop(table):
    settings = make_settings(max_grad_norm=0.5)
    model, target = model_and_target(table, settings)
    plain = copy.deepcopy(model)
    rows, visible = epoch_rows(table, torch.arange(100), settings, epoch=1)
    assert sorted(rows.tolist()) == list(range(100)) and not torch.equal(visible, table.valid[rows])
    loss = train_epoch(TrainingStep(model, table, target, settings), rows, visible)

    optimizer = torch.optim.AdamW(plain.parameters(), settings.lr, weight_decay=settings.weight_decay)
    losses = []
    for start in range(0, 100, 32):
        batch = rows[start : start + 32]
        embeddings = {name: matrix[batch] for name, matrix in table.embeddings.items()}
        output = plain(embeddings, visible[start : start + 32])
        losses.append(target.loss(output, table.log_price[batch]))
        optimizer.zero_grad()
        losses[-1].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), settings.max_grad_norm)
        optimizer.step()
    assert len(losses) == 4  # the last one of four rows
    torch.testing.assert_close(loss, torch.stack(losses).detach().mean())
    assert_same_weights(model, plain)


def test_an_epoch_draws_from_seed_and_epoch_alone(table):
    fit, settings = torch.arange(100), make_settings()

    def draws(epoch, **changes):
        rows, visible = epoch_rows(table, fit, make_settings(**changes), epoch)
        return torch.cat([rows, visible.flatten(), torch.rand(5)])

    first = draws(3)
    torch.rand(17)
    assert torch.equal(draws(3), first)
    assert not torch.equal(draws(4), first) and not torch.equal(draws(3, seed=1), first)
    assert torch.equal(hide_modalities(table.valid, 0.0), table.valid) and settings.modality_dropout > 0


def losses_of_six_steps(table, settings, model, target):
    step = TrainingStep(model, table, target, settings)
    losses = []
    for epoch in (1, 2):
        rows, visible = epoch_rows(table, torch.arange(len(table.rows)), settings, epoch)
        for batch in zip(rows.split(32)[:3], visible.split(32)[:3], strict=True):
            losses.append(step(*batch).clone())  # a recorded step writes each loss to the same place
    return torch.stack(losses)


@pytest.mark.slow
def test_compiled_step_equals_the_eager_one(table, monkeypatch):
    """The graph that torch.compile captures, without the minutes its code generator takes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, target = model_and_target(table, make_settings(dropout=0.3))  # the same masks in both
    compiled = copy.deepcopy(model)
    eager = losses_of_six_steps(table, make_settings(), model, target)
    replayed = losses_of_six_steps(table, make_settings(compile=True), compiled, target)
    torch.testing.assert_close(replayed, eager)
    assert_same_weights(compiled, model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: CUDA graphs cannot be recorded")
def test_recorded_step_equals_the_eager_one(table):
    table = table.to(torch.device("cuda"))
    model, target = model_and_target(table, make_settings(precision="fp32"))
    recorded = copy.deepcopy(model)
    eager = losses_of_six_steps(table, make_settings(precision="fp32"), model, target)
    replayed = losses_of_six_steps(table, make_settings(precision="fp32", compile=True), recorded, target)
    torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["hierarchical", "tokens", "concat", "flat"])
def test_int8_prices_are_those_of_the_model(table, variant):
    settings = make_settings(variant=variant, width=64, modality_dropout=0.0)
    model, target = model_and_target(table, settings)
    step = TrainingStep(model, table, target, settings)
    for epoch in range(25):
        train_epoch(step, *epoch_rows(table, torch.arange(100), settings, epoch))
    before = copy.deepcopy(model.state_dict())
    price = predict(model, table, torch.arange(100), target)
    torch.testing.assert_close(predict(plain_linears(model), table, torch.arange(100), target), price)
    int8 = predict(int8_copy(model), table, torch.arange(100), target)
    assert price.std() > 0.7  # the model has learnt what to lose
    difference = (int8 - price).abs()
    assert 0 < difference.mean() < 0.05 * price.std() and difference.max() < 0.3 * price.std()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(predict(model, table, torch.arange(100), target), price)
