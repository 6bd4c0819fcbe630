from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contracts.errors import InputError
from fusion.qwen_clip.chunks import average_chunks
from fusion.qwen_clip.concat import ConcatFusion
from fusion.qwen_clip.config import MODALITIES, Design, ModelConfig
from fusion.qwen_clip.cross_attention import CrossAttentionFusion
from fusion.qwen_clip.gate import GateFusion
from fusion.qwen_clip.model import QwenClip
from fusion.qwen_clip.moe import MoEFusion
from fusion.tabular import TabularBranch

DESIGNS = get_args(Design)
FUSIONS = [ConcatFusion, GateFusion, MoEFusion, CrossAttentionFusion]
FULL = {"clip_image": 768, "qwen_text": 1027}
SMALL = {"clip_image": 6, "qwen_text": 11}


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def seeded(fusion, **settings) -> nn.Module:
    torch.manual_seed(0)
    return fusion(**{"hidden": 8} | settings)


def pair(rows: int = 6, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, rows, width, generator=torch.Generator().manual_seed(0)).unbind()


def test_parameter_counts_at_width_100_and_3_classes():
    size = dict(hidden=100, num_classes=3)
    assert count(ConcatFusion(**size)) == 603

    gate = GateFusion(**size)
    assert count(gate.project_u, gate.project_v, gate.gate, gate.gate_norm) == 40_500
    assert count(gate.classifier) == 303 and count(gate) == 40_803

    moe = MoEFusion(**size)
    assert count(moe.router) == 402 and count(moe.classifier) == 303 and count(moe) == 705

    cross = CrossAttentionFusion(**size)
    assert count(cross.text_from_other, cross.other_from_text) == 81_200
    assert count(cross.head, cross.classifier) == 20_403 and count(cross) == 101_603

    assert count(TabularBranch(d_in=11, hidden=100)) == 1_222


def test_eight_heads_do_not_divide_100():
    with pytest.raises(InputError, match=r"heads=8 .* 100"):
        CrossAttentionFusion(hidden=100, heads=8)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_class_is_a_price_and_more_are_logits(fusion):
    assert seeded(fusion)(*pair()).shape == (6,)
    assert seeded(fusion, num_classes=3)(*pair()).shape == (6, 3)


def test_each_design_is_its_formula():
    u, v = pair()
    both = torch.cat([u, v], dim=1)

    concat = seeded(ConcatFusion, num_classes=3)
    torch.testing.assert_close(concat(u, v), concat.classifier(F.relu(both)))

    gate = seeded(GateFusion, num_classes=3)
    fu, fv = gate.project_u(u), gate.project_v(v)
    g = torch.sigmoid(F.layer_norm(gate.gate(torch.cat([fu, fv], dim=1)), (8,)))
    torch.testing.assert_close(gate(u, v), gate.classifier(F.relu(g * fu + (1 - g) * fv)))

    moe = seeded(MoEFusion, num_classes=3)
    p = torch.softmax(moe.router(both), dim=1)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(6))
    torch.testing.assert_close(moe(u, v), moe.classifier(F.relu(p[:, :1] * u + p[:, 1:] * v)))

    for short_path in (True, False):
        cross = seeded(CrossAttentionFusion, num_classes=3, short_path=short_path)
        a, b = cross.text_from_other, cross.other_from_text
        text = F.layer_norm(u + a.out(a.value(v)), (8,))
        other = F.layer_norm(v + b.out(b.value(text)), (8,))
        expected = cross.classifier(F.relu(cross.head(torch.cat([text, other], dim=1))))
        torch.testing.assert_close(cross(u, v), expected)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("missing", ["u", "v"])
def test_a_missing_embedding_leaves_no_trace(fusion, missing):
    u, v = pair()
    valid = torch.tensor([True, True, False, True, False, False])
    results = []
    for filler in (0.0, float("nan")):
        model = seeded(fusion)
        a, b = (
            torch.where(valid[:, None], x, filler) if n == missing else x for n, x in (("u", u), ("v", v))
        )
        output = model(a, b, **{f"{missing}_valid": valid})
        output.square().sum().backward()
        results.append((output, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(output[valid], model(u, v)[valid])


@pytest.mark.parametrize("fusion", [GateFusion, MoEFusion])
def test_a_missing_embedding_gets_no_share(fusion):
    u, v = pair()
    gone, there = torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    model = seeded(fusion, num_classes=3)
    project_u, project_v = (
        (model.project_u, model.project_v) if fusion is GateFusion else (nn.Identity(), nn.Identity())
    )
    torch.testing.assert_close(model(u, v, there, gone), model.classifier(F.relu(project_u(u))))
    torch.testing.assert_close(model(u, v, gone, there), model.classifier(F.relu(project_v(v))))
    nothing = model(u, v, gone, gone)
    torch.testing.assert_close(nothing, model.classifier.bias.expand(6, 3))


def test_tabular_branch_is_norm_linear_relu_and_skips_missing_rows():
    branch = seeded(TabularBranch, d_in=5)
    fields = torch.randn(4, 5) * 10
    expected = F.relu(branch.linear(F.layer_norm(fields, (5,))))
    torch.testing.assert_close(branch(fields), expected)
    fields[2] = float("nan")
    output = branch(fields, torch.tensor([True, True, False, True]))
    assert (output[2] == 0).all()
    torch.testing.assert_close(output[[0, 1, 3]], expected[[0, 1, 3]])


def test_chunks_are_averaged_over_those_that_exist():
    chunks = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    chunk_valid = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    expected = torch.stack([chunks[0].mean(dim=0), (chunks[1, 0] + chunks[1, 2]) / 2, torch.zeros(8)])
    torch.testing.assert_close(average_chunks(chunks, chunk_valid), expected)
    chunks = torch.where(chunk_valid[..., None], chunks, float("nan")).requires_grad_()
    average = average_chunks(chunks, chunk_valid)
    torch.testing.assert_close(average, expected)
    average.sum().backward()
    assert (chunks.grad[~chunk_valid] == 0).all() and chunks.grad.isfinite().all()


def small_baseline(design: str, **settings) -> QwenClip:
    torch.manual_seed(0)
    settings = {"hidden": 16, "heads": 2, "dropout": 0.0} | settings
    return QwenClip(ModelConfig(design=design, **settings), SMALL)


def batch(rows: int = 8) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = {name: torch.randn(rows, d, generator=generator) for name, d in SMALL.items()}
    return embeddings, torch.ones(rows, len(MODALITIES), dtype=torch.bool)


def test_baseline_parameter_counts():
    with torch.device("meta"):
        attention = QwenClip(ModelConfig(), FULL)
        plain = QwenClip(ModelConfig(design="plain"), FULL)
    assert count(attention) == 7_654_536 and round(count(attention) / 1e6, 1) == 7.7
    assert count(plain) == 1_578_499 and round(count(plain) / 1e6, 1) == 1.6


@pytest.mark.parametrize("design", DESIGNS)
def test_baseline_with_masks(design):
    embeddings, valid = batch()
    valid[2, 0] = valid[3, 1] = False
    valid[4] = False
    results = []
    for filler in (0.0, float("nan")):
        filled = {
            name: torch.where(valid[:, i : i + 1], embeddings[name], filler)
            for i, name in enumerate(MODALITIES)
        }
        model = small_baseline(design)
        output = model(filled, valid)
        output.log_price.square().sum().backward()
        results.append((output, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    everything = model(embeddings, torch.ones_like(valid)).log_price
    assert output.log_price.shape == (8,) and output.log_price.isfinite().all()
    changed = ~torch.isclose(everything, output.log_price)
    assert changed.tolist() == (~valid.all(dim=1)).tolist()


def test_attention_moe_is_its_definition():
    model, (embeddings, _) = small_baseline("attention_moe"), batch()
    valid = torch.rand(8, 2, generator=torch.Generator().manual_seed(1)) > 0.4
    image_valid, text_valid = valid[:, :1], valid[:, 1:]
    image = model.image(embeddings["clip_image"]) * image_valid
    text = model.text(embeddings["qwen_text"]) * text_valid
    a, b = model.fusion.text_from_image, model.fusion.image_from_text
    fused_text = a.norm(text + a.out(a.value(image)) * image_valid)
    fused_image = b.norm(image + b.out(b.value(text)) * text_valid)
    expected, gate = model.fusion.experts(torch.cat([fused_text, fused_image], dim=1))
    output = model(embeddings, valid)
    torch.testing.assert_close((output.log_price, output.gate), (expected[:, 0], gate))


@pytest.mark.parametrize("design", DESIGNS)
def test_baseline_shuffled_rows_permute_the_predictions(design):
    model, (embeddings, valid) = small_baseline(design).eval(), batch()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = model({name: e[order] for name, e in embeddings.items()}, valid[order])
    torch.testing.assert_close(shuffled.log_price, model(embeddings, valid).log_price[order])


@pytest.mark.parametrize("design", DESIGNS)
def test_baseline_overfits_a_tiny_batch(design):
    model, (embeddings, valid) = small_baseline(design, hidden=32), batch(8)
    log_price = torch.linspace(0.5, 5.0, 8)
    model.set_output_bias(log_price.mean().item())
    assert (model(embeddings, valid).log_price - log_price.mean()).abs().max() < 1.5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = (model(embeddings, valid).log_price - log_price).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("design", DESIGNS)
def test_baseline_compiles_without_a_graph_break(design):
    model, (embeddings, valid) = small_baseline(design), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(embeddings, valid), model(embeddings, valid))


def test_baseline_refuses_wrong_settings():
    with pytest.raises(InputError, match="design 'sum' is not one of attention_moe, plain, concat"):
        small_baseline("sum")
    with pytest.raises(InputError, match="qwen_text"):
        QwenClip(ModelConfig(), {"clip_image": 768})
    with pytest.raises(InputError, match="dropout=1.0"):
        small_baseline("plain", dropout=1.0)
    with pytest.raises(InputError, match="heads=5 .* 16"):
        small_baseline("cross_attention", heads=5)
