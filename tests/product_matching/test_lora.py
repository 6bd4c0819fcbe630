import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from contracts.errors import InputError
from product_matching.lora import add_lora, target_layers, trainable

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
ARCHITECTURES = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SMALL)),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**SMALL)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_attention_and_dense_layer_gets_an_adapter_and_nothing_else(name):
    torch.manual_seed(0)
    transformer = ARCHITECTURES[name]()
    # per block: 4 attention projections 16→16, 16→32, 32→16, each r (in + out)
    expected = 2 * 8 * (4 * (16 + 16) + (16 + 32) + (32 + 16))
    layers = target_layers(transformer)
    assert len(layers) == 2 * 6 and not any("pooler" in layer for layer in layers)
    add_lora(transformer, rank=8, alpha=16, dropout=0.1)
    weights = trainable(transformer)
    assert sum(weight.numel() for weight in weights.values()) == expected
    assert all("lora_" in name for name in weights)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_adapter_receives_a_gradient(name):
    torch.manual_seed(0)
    transformer = ARCHITECTURES[name]()
    add_lora(transformer, rank=2, alpha=4, dropout=0.0)
    tokens = torch.randint(2, 50, (2, 5))
    transformer(input_ids=tokens).last_hidden_state.pow(2).sum().backward()
    # B starts at zero, so at first only B has a gradient
    ups = {name: weight.grad for name, weight in trainable(transformer).items() if "lora_B" in name}
    assert len(ups) == 12 and all(
        gradient is not None and gradient.abs().sum() > 0 for gradient in ups.values()
    )


def test_one_wrong_name_is_an_error_even_beside_right_ones():
    transformer = ARCHITECTURES["mpnet"]()
    with pytest.raises(InputError, match="no linear layer is called query, key; there are dense, k, o, q, v"):
        target_layers(transformer, "query,key,dense")
    assert len(target_layers(transformer, "q, v")) == 4


def test_an_unknown_architecture_is_an_error_that_says_what_to_set():
    config = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=50)
    transformer = DistilBertModel(config)
    with pytest.raises(InputError, match="--target-modules auto knows bert.*not distilbert"):
        target_layers(transformer)
    assert len(target_layers(transformer, "q_lin,v_lin")) == 2


def test_a_fresh_adapter_changes_nothing_and_a_merged_one_stays_equal():
    torch.manual_seed(0)
    transformer, tokens = ARCHITECTURES["bert"]().eval(), torch.tensor([[3, 4, 5]])
    before = transformer(input_ids=tokens).last_hidden_state
    adapters = add_lora(transformer, rank=4, alpha=8, dropout=0.1)
    transformer.eval()
    torch.testing.assert_close(transformer(input_ids=tokens).last_hidden_state, before)
    for name, weight in trainable(transformer).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted = transformer(input_ids=tokens).last_hidden_state
    assert (adapted - before).abs().max() > 0.01
    adapters.merge_and_unload()
    assert not any("lora" in name for name in transformer.state_dict())
    torch.testing.assert_close(transformer(input_ids=tokens).last_hidden_state, adapted, atol=1e-5, rtol=1e-4)


def test_minilm_has_the_count_of_the_readme(minilm):
    from product_matching.encoder import load_encoder

    encoder = load_encoder(minilm, device="cpu")
    add_lora(encoder[0].auto_model, rank=8, alpha=16, dropout=0.1)
    assert sum(weight.numel() for weight in trainable(encoder).values()) == 331_776
