import dataclasses
from typing import get_args

import pytest
import torch

from contracts.errors import InputError
from fusion.all_embeddings.config import MODALITIES, ModelConfig, Variant
from fusion.all_embeddings.model import AllEmbeddings

FULL = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}
SMALL = {"clip_image": 6, "siglip_image": 9, "siglip_text": 8, "qwen_text": 11}
VARIANTS = get_args(Variant)


def small_model(variant: str, *, seed: int = 0, **settings) -> AllEmbeddings:
    torch.manual_seed(seed)
    settings = {"width": 16, "heads": 2, "dropout": 0.0} | settings
    return AllEmbeddings(ModelConfig(variant=variant, **settings), SMALL)


def batch(rows: int = 8, *, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = {name: torch.randn(rows, d, generator=generator) for name, d in SMALL.items()}
    return embeddings, torch.ones(rows, len(MODALITIES), dtype=torch.bool)


def random_valid(rows: int) -> torch.Tensor:
    return torch.rand(rows, len(MODALITIES), generator=torch.Generator().manual_seed(1)) > 0.4


def parameters_at_full_size(**settings) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AllEmbeddings(ModelConfig(**settings), FULL).parameters())


def with_every_option(variant: str) -> dict:
    return {"auxiliary_under_15": True, "structural_branch": variant != "flat"}


@pytest.mark.parametrize("short_path", [True, False])
def test_parameter_counts_of_the_specification(short_path):
    assert parameters_at_full_size(variant="hierarchical", short_path=short_path) == 13_464_074
    assert parameters_at_full_size(variant="concat", short_path=short_path) == 8_114_442


def test_parameter_counts_of_the_other_variants():
    assert parameters_at_full_size(variant="tokens") == 14_520_842
    assert parameters_at_full_size(variant="flat") == 4_727_297
    assert parameters_at_full_size(variant="branch_mixture") == 5_594_126
    assert parameters_at_full_size(variant="branch_weights") == 5_585_934


def test_branches_of_their_own_width_change_the_count_by_their_layers():
    narrow = parameters_at_full_size(branch_widths=("clip_image=256", "siglip_image=256"))
    fewer_outputs = 256 * (768 + 1152 + 2 * 3)  # Linear with bias, and LayerNorm
    brought_to_512 = 2 * 256 * 512
    fewer_expert_inputs = 256 * 3 * (1024 + 1)  # clip joins them at its own width: first layers and gate
    assert narrow == 13_464_074 - fewer_outputs + brought_to_512 - fewer_expert_inputs
    assert parameters_at_full_size(branch_widths=("clip_image=512",)) == 13_464_074


def test_the_query_and_key_projections_are_dead():
    model = small_model("hierarchical")
    output = model(*batch())
    output.log_price.square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None]
    assert dead and all(".query." in name or ".key." in name for name in dead)
    with torch.device("meta"):
        full = dict(AllEmbeddings(ModelConfig(), FULL).named_parameters())
    assert sum(full[name].numel() for name in dead) == 1_575_936


def test_with_tokens_nothing_is_dead():
    model = small_model("tokens")
    model(*batch()).log_price.square().sum().backward()
    # A key's bias moves all scores of a query alike, which the softmax does not see.
    alive = {n: p.grad.abs().max() for n, p in model.named_parameters() if not n.endswith("key.bias")}
    assert all(g > 1e-7 for g in alive.values()), min(alive.items(), key=lambda item: item[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_shapes_and_finite_values(variant):
    model = small_model(variant, **with_every_option(variant))
    log_price, gate, under_15_logit = model(*batch(5))
    assert log_price.shape == under_15_logit.shape == (5,)
    if variant == "flat":
        assert gate is None
    else:
        torch.testing.assert_close(gate.sum(dim=1), torch.ones(5))
    assert log_price.isfinite().all() and log_price.std() > 0
    assert small_model(variant)(*batch(5)).under_15_logit is None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("missing", MODALITIES)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_a_missing_modality_leaves_no_trace(variant, missing, garbage):
    embeddings, valid = batch()
    gone = torch.tensor([True, False] * 4)
    valid[gone, MODALITIES.index(missing)] = False
    results = []
    for filler in (0.0, garbage):
        model = small_model(variant, **with_every_option(variant))
        filled = embeddings | {missing: torch.where(gone[:, None], filler, embeddings[missing])}
        output = model(filled, valid)
        (output.log_price.square().sum() + output.under_15_logit.square().sum()).backward()
        results.append((output, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    everything = model(embeddings, torch.ones_like(valid)).log_price
    assert not torch.isclose(everything[gone], output.log_price[gone]).any(), "the mask must matter"
    torch.testing.assert_close(everything[~gone], output.log_price[~gone])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_without_any_embedding_gets_one_finite_constant(variant):
    model = small_model(variant, **with_every_option(variant))
    embeddings = {name: torch.full((3, d), float("nan")) for name, d in SMALL.items()}
    output = model(embeddings, torch.zeros(3, len(MODALITIES), dtype=torch.bool))
    assert output.log_price.isfinite().all() and output.log_price.unique().numel() == 1
    (output.log_price.sum() + output.under_15_logit.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_modality_reaches_the_price(variant):
    model, (embeddings, valid) = small_model(variant), batch()
    inputs = {name: e.requires_grad_() for name, e in embeddings.items()}
    model(inputs, valid).log_price.sum().backward()
    for name, embedding in inputs.items():
        assert (embedding.grad.abs().sum(dim=0) > 0).all(), f"some of {name} has no effect"


@pytest.mark.parametrize("variant", VARIANTS)
def test_shuffled_rows_permute_the_predictions(variant):
    model = small_model(variant).eval()
    embeddings, valid = batch(16)[0], random_valid(16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    shuffled = model({name: e[order] for name, e in embeddings.items()}, valid[order])
    torch.testing.assert_close(shuffled.log_price, model(embeddings, valid).log_price[order])


def attend(block, query, key_value, key_valid):
    """The block with one key, written out."""
    return block.norm(query + block.out(block.value(key_value)) * key_valid[:, None])


def test_hierarchical_is_its_definition():
    model, (embeddings, _) = small_model("hierarchical"), batch(16)
    valid = random_valid(16)
    clip_ok, siglip_image_ok, siglip_text_ok, qwen_ok = valid.unbind(1)
    clip, siglip_image, siglip_text, qwen = (
        model.fusion.branches[name](embeddings[name]) * valid[:, [i]] for i, name in enumerate(MODALITIES)
    )
    image = attend(model.fusion.image_from_image, clip, siglip_image, siglip_image_ok)
    text = attend(model.fusion.text_from_text, qwen, siglip_text, siglip_text_ok)
    multimodal = attend(model.fusion.image_from_text, image, text, qwen_ok | siglip_text_ok)
    expected, gate = model.head(torch.cat([multimodal, image, text, clip], dim=1))
    output = model(embeddings, valid)
    torch.testing.assert_close((output.log_price, output.gate), (expected[:, 0], gate))


def test_concat_is_its_definition():
    model, (embeddings, _) = small_model("concat"), batch(16)
    valid = random_valid(16)
    clip_ok, siglip_image_ok, siglip_text_ok, qwen_ok = valid.unbind(1)
    clip, siglip_image, siglip_text, qwen = (
        model.fusion.branches[name](embeddings[name]) * valid[:, [i]] for i, name in enumerate(MODALITIES)
    )
    image, text = torch.cat([clip, siglip_image], dim=1), torch.cat([qwen, siglip_text], dim=1)
    image = attend(model.fusion.images, image, image, clip_ok | siglip_image_ok)
    text = attend(model.fusion.texts, text, text, qwen_ok | siglip_text_ok)
    both = torch.cat([image, text], dim=1)
    both = attend(model.fusion.multimodal, both, both, valid.any(dim=1))
    torch.testing.assert_close(model(embeddings, valid).log_price, model.head(both)[0][:, 0])


def test_tokens_weigh_the_keys_per_product():
    """Attention over several tokens is not LayerNorm(q + W_o W_v mean(kv)), which weighs nothing."""
    model, (embeddings, _) = small_model("tokens"), batch()
    tokens = model.fusion.to_tokens(
        "siglip_image", model.fusion.branches["siglip_image"](embeddings["siglip_image"])
    )
    query = model.fusion.to_tokens(
        "clip_image", model.fusion.branches["clip_image"](embeddings["clip_image"])
    )
    assert tokens.shape == query.shape == (8, 4, 16)
    block = model.fusion.image_from_image
    uniform = block.norm(query + block.out(block.value(tokens.mean(dim=1, keepdim=True))))
    assert (block(query, tokens) - uniform).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["hierarchical", "concat"])
def test_short_path_and_full_attention_agree(variant):
    short, full = small_model(variant), small_model(variant, seed=1, short_path=False)
    full.load_state_dict(short.state_dict())
    embeddings, valid = batch(16)[0], random_valid(16)
    torch.testing.assert_close(short(embeddings, valid), full(embeddings, valid))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tiny_batch_is_overfitted(variant):
    model, (embeddings, valid) = small_model(variant, width=32), batch(16)
    log_price = torch.linspace(0.5, 5.0, 16)
    model.set_output_bias(log_price.mean().item())
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = (model(embeddings, valid).log_price - log_price).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_start_near_the_output_bias(variant):
    model = small_model(variant, width=64)
    model.set_output_bias(2.7)
    assert (model(*batch()).log_price - 2.7).abs().max() < 1.5
    assert abs(model(*batch()).log_price.mean() - 2.7) < 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_compiles_without_a_graph_break(variant):
    model, (embeddings, valid) = small_model(variant, **with_every_option(variant)), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(embeddings, valid), model(embeddings, valid))


def branches_of(model, embeddings, valid):
    """(B, D) of each embedding, zero where it is missing."""
    branches = model.fusion.branches
    return [branches[name](embeddings[name]) * valid[:, [i]] for i, name in enumerate(MODALITIES)]


def test_branch_mixture_is_its_definition():
    """The gate sees all branches and weighs those that are there."""
    model, (embeddings, _) = small_model("branch_mixture"), batch(16)
    valid = random_valid(16)
    assert valid.any(dim=1).all() and not valid.all()
    x = branches_of(model, embeddings, valid)
    weights = model.fusion.gate(torch.cat(x, dim=1)).exp() * valid
    shares = weights / weights.sum(dim=1, keepdim=True)
    fused = sum(shares[:, [i]] * x[i] for i in range(4))
    torch.testing.assert_close(model(embeddings, valid).log_price, model.head(fused)[0][:, 0])


def test_branch_weights_are_one_number_per_embedding():
    model, (embeddings, _) = small_model("branch_weights"), batch(16)
    valid = random_valid(16)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    model.fusion.weights.data.copy_(logits)
    x = branches_of(model, embeddings, valid)
    weights = logits.exp() * valid
    shares = weights / weights.sum(dim=1, keepdim=True)
    fused = sum(shares[:, [i]] * x[i] for i in range(4))
    torch.testing.assert_close(model(embeddings, valid).log_price, model.head(fused)[0][:, 0])


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "flat"])
def test_a_branch_of_its_own_width_joins_every_variant(variant):
    """It learns, it respects the mask, and the other branches keep their width."""
    widths = ("clip_image=6", "qwen_text=24")
    model = small_model(variant, branch_widths=widths, structural_branch=True)
    branches = model.fusion.branches
    usual = 8 if variant == "concat" else 16
    assert {name: branch.layers[0][0].out_features for name, branch in branches.items()} == {
        "clip_image": 6, "siglip_image": usual, "siglip_text": usual, "qwen_text": 24, "structural": usual,
    }  # fmt: skip
    embeddings, valid = batch()
    valid[:4, MODALITIES.index("clip_image")] = False
    output = model(embeddings, valid).log_price
    embeddings["clip_image"][:4] = float("nan")
    torch.testing.assert_close(model(embeddings, valid).log_price, output)
    output.square().sum().backward()
    for name, projection in model.fusion.equal_widths.items():
        assert (projection.weight.grad.abs().sum(dim=1) > 0).all(), name


def test_a_branch_of_the_usual_width_needs_no_projection():
    plain = small_model("hierarchical")
    named = small_model("hierarchical", branch_widths=("clip_image=16",))
    assert list(named.state_dict()) == list(plain.state_dict())
    assert not list(plain.fusion.equal_widths.parameters())


def test_clip_joins_the_experts_at_its_own_width():
    model = small_model("hierarchical", branch_widths=("clip_image=6",))
    assert model.head.gate.in_features == 3 * 16 + 6


def test_the_structural_branch_takes_the_last_three_columns():
    model = small_model("hierarchical", structural_branch=True)
    branches = model.fusion.branches
    assert branches["qwen_text"].layers[0][0].in_features == SMALL["qwen_text"] - 3
    embeddings, valid = batch()
    columns = dict(zip(MODALITIES, valid.unbind(1), strict=True))
    before = branches(embeddings, columns)
    embeddings["qwen_text"][:, -3:] += 1.0
    after = branches(embeddings, columns)
    torch.testing.assert_close(before["qwen_text"], after["qwen_text"], rtol=0, atol=0)
    assert not torch.isclose(before["structural"], after["structural"]).all(dim=1).any()


@pytest.mark.parametrize("experts", [1, 2, 3, 5])
def test_number_of_experts(experts):
    gate = small_model("hierarchical", experts=experts)(*batch()).gate
    assert gate.shape == (8, experts)


def test_two_layer_branches_and_token_numbers_run():
    for settings in ({"branch_depth": 2, "branch_hidden": 12}, {"tokens_per_embedding": 8}):
        assert small_model("tokens", **settings)(*batch()).log_price.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "deep"}, "variant 'deep' is not one of hierarchical, concat, flat, tokens"),
        ({"branch_widths": ("clip_image",)}, "branch_widths clip_image: write .* clip_image=256"),
        ({"branch_widths": ("clip_image=0",)}, "clip_image=0: write"),
        ({"branch_widths": ("clip_image=-8",)}, "clip_image=-8: write"),
        ({"branch_widths": ("clip=256",)}, "clip=256: .* embeddings are clip_image, "),
        ({"branch_widths": ("clip_image=8", "clip_image=9")}, "clip_image already has the width 8"),
        ({"variant": "flat", "branch_widths": ("clip_image=8",)}, "flat has no branches"),
        ({"width": 33}, "width=33 must be even"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"variant": "tokens", "tokens_per_embedding": 3}, "tokens_per_embedding=3 .* width=512"),
        ({"variant": "flat", "structural_branch": True}, "flat has no branches"),
        ({"heads": 7}, "heads=7 .* 512"),
        ({"experts": 0}, "experts=0"),
        ({"branch_depth": 3}, "depth 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with torch.device("meta"), pytest.raises(InputError, match=message):
        AllEmbeddings(ModelConfig(**settings), FULL)


def test_widths_must_name_the_four_embeddings():
    with pytest.raises(InputError, match="clip_image"):
        AllEmbeddings(ModelConfig(), {"clip": 768})
    with pytest.raises(InputError, match="width 3"):
        AllEmbeddings(ModelConfig(structural_branch=True), SMALL | {"qwen_text": 3})


def test_every_setting_is_a_plain_value():
    plain = int | float | str | bool | tuple  # the command line and settings.json know these
    assert all(isinstance(value, plain) for value in dataclasses.asdict(ModelConfig()).values())
