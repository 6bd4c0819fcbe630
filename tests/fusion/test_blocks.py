import copy

import pytest
import torch
from torch import nn

from contracts.errors import InputError
from fusion.blocks import AttentionBlock, EmbeddingBranch, MixtureOfExperts, expert_products


def seeded(module_of, *, seed: int = 0, **settings) -> nn.Module:
    torch.manual_seed(seed)
    return module_of(**settings).double()


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_branch_is_scale_linear_norm_gelu():
    branch = seeded(EmbeddingBranch, d_in=5, d_out=8, dropout=0.0)
    linear, norm = branch.layers[0][0], branch.layers[0][1]
    with torch.no_grad():
        branch.scale.fill_(3.0)
        norm.weight.uniform_(0.5, 2.0)
    x = torch.randn(4, 5).double()
    expected = nn.functional.gelu(norm(3.0 * x @ linear.weight.T + linear.bias))
    torch.testing.assert_close(branch(x), expected)
    branch(x).square().sum().backward()
    assert branch.scale.grad.abs() > 1e-4, "the scale must not be cancelled by the LayerNorm"


def test_branch_in_bf16_is_nearly_that_in_float():
    branch, x = seeded(EmbeddingBranch, d_in=64, d_out=32, dropout=0.0).float(), torch.randn(9, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = branch(x, torch.arange(9) > 2)
    assert half.dtype == torch.float32  # from the norm on
    torch.testing.assert_close(half, branch(x, torch.arange(9) > 2), atol=0.03, rtol=0)


def test_two_layer_branch_is_the_known_squeeze():
    with torch.device("meta"):
        branch = EmbeddingBranch(d_in=1152, d_out=512, dropout=0.25, depth=2)
    expected = 1 + (1152 * 768 + 768 + 2 * 768) + (768 * 512 + 512 + 2 * 512)
    assert parameter_count(branch) == expected
    with pytest.raises(InputError, match="depth 3"):
        EmbeddingBranch(d_in=4, d_out=4, dropout=0.0, depth=3)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_a_missing_embedding_leaves_no_trace_in_output_or_gradient(garbage):
    x = torch.randn(6, 5).double()
    valid = torch.tensor([True, False, True, True, False, True])
    gradients = []
    for filler in (0.0, garbage):
        branch = seeded(EmbeddingBranch, d_in=5, d_out=8, dropout=0.0)
        filled = torch.where(valid[:, None], x, filler)
        output = branch(filled, valid)
        assert (output[~valid] == 0).all() and (output[valid] != 0).any()
        output.square().sum().backward()
        gradients.append([p.grad for p in branch.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def attention_pair(**settings) -> tuple[AttentionBlock, AttentionBlock]:
    """The faithful block and the short one with the same parameters."""
    full = seeded(AttentionBlock, short_path=False, **settings)
    short = seeded(AttentionBlock, seed=1, short_path=True, **settings)
    with torch.no_grad():
        full.norm.weight.uniform_(0.5, 2.0)
    short.load_state_dict(full.state_dict())
    return full, short


@pytest.mark.parametrize("mask", [None, [True, False, True, True, False, True]])
def test_short_path_equals_attention_over_one_key_in_output_and_gradient(mask):
    full, short = attention_pair(width=16, heads=4)
    key_valid = None if mask is None else torch.tensor(mask)
    query, key_value = torch.randn(2, 6, 16).double().unbind()
    results = []
    for block in (full, short):
        q, kv = query.clone().requires_grad_(), key_value.clone().requires_grad_()
        output = block(q, kv, key_valid)
        (output * torch.arange(16)).square().sum().backward()
        live = {n: p.grad for n, p in block.named_parameters() if not n.startswith(("query", "key"))}
        assert all(g.abs().sum() > 0 for g in live.values())
        results.append((output, q.grad, kv.grad, live))
    torch.testing.assert_close(results[0], results[1])
    for name, parameter in full.named_parameters():
        if name.startswith(("query", "key")):
            assert parameter.grad.abs().max() < 1e-12, f"{name} is dead with one key, but for rounding"
    assert short.query.weight.grad is None and short.key.weight.grad is None
    assert parameter_count(full) == parameter_count(short)


def test_one_key_is_layer_norm_of_query_plus_projected_value():
    _, short = attention_pair(width=16, heads=4)
    q, kv = torch.randn(2, 5, 16).double().unbind()
    torch.testing.assert_close(short(q, kv), short.norm(q + short.out(short.value(kv))))


def test_attention_equals_torch_multihead_attention():
    block = seeded(AttentionBlock, width=16, heads=4)
    reference = nn.MultiheadAttention(16, 4, batch_first=True).double()
    with torch.no_grad():
        projections = (block.query, block.key, block.value)
        reference.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        reference.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    reference.out_proj.load_state_dict(block.out.state_dict())
    q, kv = torch.randn(3, 2, 16).double(), torch.randn(3, 5, 16).double()
    key_valid = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
    attended, _ = reference(q, kv, kv, key_padding_mask=~key_valid)
    torch.testing.assert_close(block(q, kv, key_valid), block.norm(q + attended))
    block(q, kv, key_valid).square().sum().backward()
    assert block.query.weight.grad.abs().sum() > 0, "with several keys the query projection must learn"


@pytest.mark.parametrize("short_path", [True, False])
@pytest.mark.parametrize("keys", [1, 3])
def test_without_a_key_the_block_adds_nothing(keys, short_path):
    block = seeded(AttentionBlock, width=16, heads=4, short_path=short_path)
    q = torch.randn(4, 2, 16).double()
    kv = torch.full((4, keys, 16), float("nan")).double()
    kv[0] = 1.0
    output = block(q, kv, torch.tensor([True, False, False, False]))
    torch.testing.assert_close(output[1:], block.norm(q)[1:])
    assert not torch.allclose(output[0], block.norm(q)[0])
    output.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())


def test_a_row_without_keys_needs_no_mercy_from_the_attention_kernel(monkeypatch):
    def textbook_attention(q, k, v, attn_mask):
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~attn_mask, -torch.inf)
        return scores.softmax(dim=-1) @ v  # NaN where every key is masked

    block = seeded(AttentionBlock, width=16, heads=4)
    q, kv = torch.randn(4, 3, 16).double(), torch.randn(4, 3, 16).double()
    key_valid = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()
    expected = block(q, kv, key_valid)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", textbook_attention)
    torch.testing.assert_close(block(q, kv, key_valid), expected)
    block(q, kv, key_valid).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_values_of_missing_keys_do_not_matter():
    block = seeded(AttentionBlock, width=16, heads=4)
    q, kv = torch.randn(4, 3, 16).double(), torch.randn(4, 3, 16).double()
    key_valid = torch.tensor([[True, True, False]]).expand(4, 3)
    dirty = kv.clone()
    dirty[:, 2] = float("nan")
    torch.testing.assert_close(block(q, kv, key_valid), block(q, dirty, key_valid), rtol=0, atol=0)
    torch.testing.assert_close(block(q, kv, key_valid), block(q, kv[:, :2]))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(InputError, match=r"heads=8 .* 100"):
        AttentionBlock(width=100, heads=8)


def dense_mixture(mixture: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """The same mixture, one expert after the other; the first layer's rows belong to one expert after the other."""
    gate = torch.softmax(x @ mixture.gate.weight.T + mixture.gate.bias, dim=1)
    total = torch.zeros(len(x), mixture.weights[-1].shape[2], dtype=x.dtype)
    width = len(mixture.first.bias) // gate.shape[1]
    for e in range(gate.shape[1]):
        own = slice(e * width, (e + 1) * width)
        h = x @ mixture.first.weight[own].T + mixture.first.bias[own]
        for weight, bias in zip(mixture.weights, mixture.biases, strict=True):
            h = nn.functional.gelu(h) @ weight[e] + bias[e, 0]
        total += gate[:, e : e + 1] * h
    return total


@pytest.mark.parametrize("experts", [1, 2, 3, 5])
@pytest.mark.parametrize("d_out", [1, 2])
def test_mixture_equals_a_plain_loop_over_experts(experts, d_out):
    mixture = seeded(MixtureOfExperts, d_in=7, hidden=(6, 5, 4), experts=experts, dropout=0.0, d_out=d_out)
    x = torch.randn(9, 7).double()
    output, gate = mixture(x)
    assert output.shape == (9, d_out) and gate.shape == (9, experts)
    torch.testing.assert_close(output, dense_mixture(mixture, x))
    torch.testing.assert_close(gate.sum(dim=1), torch.ones(9).double())


def test_product_per_expert_equals_the_batched_product_and_its_gradients():
    torch.manual_seed(0)
    bias, weight, x = (torch.randn(*shape).double() for shape in ((3, 1, 4), (3, 6, 4), (70, 6)))
    inputs = [tensor.requires_grad_() for tensor in (bias, x, weight)]
    results = []
    for product in (expert_products, torch.baddbmm):
        out = product(bias, x.expand(3, -1, -1), weight)
        assert ("ProductPerExpert" in out.grad_fn.name()) == (product is expert_products)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, batched in zip(*results, strict=True):
        torch.testing.assert_close(ours, batched)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            expert_products(bias.float(), x.float().expand(3, -1, -1), weight.float()).dtype == torch.bfloat16
        )


def test_mixture_is_initialised_as_nn_linear():
    torch.manual_seed(0)
    mixture = MixtureOfExperts(d_in=64, hidden=(128, 256), experts=3, dropout=0.0)
    for weight, bias, linear in (
        (mixture.first.weight, mixture.first.bias, nn.Linear(64, 384)),
        (mixture.weights[0], mixture.biases[0], nn.Linear(128, 256)),
    ):
        bound = linear.in_features**-0.5
        for ours, reference in ((weight, linear.weight), (bias, linear.bias)):
            assert 0.97 * bound < ours.abs().max() <= bound
            assert ours.std().item() == pytest.approx(reference.std().item(), rel=0.1)
    assert not torch.equal(mixture.weights[0][0], mixture.weights[0][1]), "experts must start apart"


def test_mixture_starts_near_its_output_bias():
    mixture = seeded(MixtureOfExperts, d_in=64, hidden=(64, 32), experts=3, dropout=0.0)
    mixture.set_output_bias(2.7)
    output, _ = mixture(torch.randn(50, 64).double())
    assert (output - 2.7).abs().max() < 0.5


def test_mixture_drops_only_in_training():
    mixture = seeded(MixtureOfExperts, d_in=8, hidden=(16,), experts=2, dropout=0.5)
    x = torch.randn(4, 8).double()
    assert not torch.equal(mixture(x)[0], mixture(x)[0])
    evaluated = copy.deepcopy(mixture).eval()
    torch.testing.assert_close(evaluated(x)[0], dense_mixture(mixture, x))
