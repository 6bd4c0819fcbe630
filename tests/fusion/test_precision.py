"""A price model inside bf16 autocast: the hidden layers may round, the price must not."""

from typing import get_args

import pandas as pd
import pytest
import torch

from contracts.workspace import CLIP_IMAGE, QWEN_TEXT
from fusion.all_embeddings.config import AllEmbeddingsSettings, ModelConfig, Variant
from fusion.all_embeddings.model import AllEmbeddings
from fusion.dataset import FusionTable
from fusion.qwen_clip.config import Design
from fusion.qwen_clip.config import ModelConfig as PairConfig
from fusion.qwen_clip.model import QwenClip
from fusion.step import TrainingStep
from fusion.target import Target

WIDTHS = {"clip_image": 24, "siglip_image": 20, "siglip_text": 16, "qwen_text": 27}
PAIR_WIDTHS = {name: WIDTHS[name] for name in (CLIP_IMAGE, QWEN_TEXT)}
ROWS = 2000
GRID = 1 / 64
"""Spacing of bf16 numbers between 2 and 4, where log prices from $6 to $54 lie."""


def four(variant: str, **settings) -> AllEmbeddings:
    config = ModelConfig(variant=variant, width=32, heads=2, dropout=0.0, **settings)
    return seeded(AllEmbeddings, config, WIDTHS)


def two(design: str) -> QwenClip:
    return seeded(QwenClip, PairConfig(design=design, hidden=32, heads=2, dropout=0.0), PAIR_WIDTHS)


def seeded(model_class, config, widths):
    torch.manual_seed(0)
    model = model_class(config, widths)
    model.set_output_bias(2.6)
    return model.eval()


def batch(widths):
    generator = torch.Generator().manual_seed(0)
    embeddings = {name: torch.randn(ROWS, width, generator=generator) for name, width in widths.items()}
    return embeddings, torch.rand(ROWS, len(widths), generator=generator) > 0.1


CASES = [
    *(pytest.param(four, variant, WIDTHS, id=variant) for variant in get_args(Variant)),
    *(pytest.param(two, design, PAIR_WIDTHS, id=design) for design in get_args(Design)),
]


@pytest.mark.parametrize(("build", "name", "widths"), CASES)
def test_the_price_is_not_on_the_grid_of_bf16(build, name, widths):
    model = build(name)
    embeddings, valid = batch(widths)
    with torch.no_grad():
        exact = model(embeddings, valid).log_price
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(embeddings, valid).log_price

    assert mixed.dtype == torch.float32
    between = mixed[(mixed > 2) & (mixed < 4)]
    assert len(between) > ROWS / 2
    off_grid = (between / GRID - (between / GRID).round()).abs()
    assert off_grid.mean() > 0.2  # a quarter for numbers that know no grid, zero for bf16
    assert 0 < (mixed - exact).abs().mean() < GRID / 4  # what the hidden layers round


def test_every_output_is_float32():
    embeddings, valid = batch(WIDTHS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = four("hierarchical", auxiliary_under_15=True)(embeddings, valid)
    assert output.log_price.dtype == output.gate.dtype == output.under_15_logit.dtype == torch.float32
    torch.testing.assert_close(output.gate.sum(dim=1), torch.ones(ROWS))
    assert output.under_15_logit.unique().numel() > ROWS / 2


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_bf16_step_learns_like_a_float32_step(variant):
    embeddings, valid = batch(WIDTHS)
    log_price = 2.6 + 0.5 * embeddings[QWEN_TEXT][:, 0]
    rows = pd.DataFrame({"price": log_price.double().expm1().numpy()})
    table = FusionTable.of(rows, embeddings, valid)
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = AllEmbeddingsSettings(precision=precision, lr=3e-3, device="cpu")
        model = four(variant)
        step = TrainingStep(model, table, Target.of(settings, log_price), settings)
        epoch = torch.arange(ROWS).split(100)
        taken = [step(batch, valid[batch]) for batch in 3 * epoch]
        assert all(loss.dtype == torch.float32 for loss in taken)
        losses[precision] = torch.stack(taken)
    assert losses["fp32"][-20:].mean() < 0.8 * losses["fp32"][:5].mean()
    torch.testing.assert_close(losses["bf16"].mean(), losses["fp32"].mean(), rtol=0.02, atol=0)
