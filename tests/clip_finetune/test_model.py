import json
from dataclasses import replace

import pytest
import torch

from clip_finetune.config import PRESETS, ClipSettings
from contracts.errors import InputError
from training.device import guard_torchvision

guard_torchvision()
from clip_finetune.model import (  # noqa: E402
    HEAD,
    build_model,
    build_tokenizer,
    depth,
    load_model,
    parameter_groups,
    save_model,
    unfreeze,
)

TINY = ClipSettings(preset="tiny", **PRESETS["tiny"])  # three image blocks, two text blocks


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(TINY)


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("clip.visual.proj", 0), ("clip.text_projection", 0), ("clip.logit_scale", 0), ("clip.ln_final.weight", 0),
        ("clip.visual.ln_post.bias", 0), ("price_head.layers.1.weight", 0),
        ("clip.visual.transformer.resblocks.2.ln_1.weight", 1), ("clip.transformer.resblocks.1.ln_1.weight", 1),
        ("clip.visual.transformer.resblocks.0.mlp.c_fc.weight", 3),
        ("clip.visual.conv1.weight", 4), ("clip.visual.class_embedding", 4), ("clip.visual.ln_pre.weight", 4),
        ("clip.visual.positional_embedding", 4), ("clip.token_embedding.weight", 3), ("clip.positional_embedding", 3),
    ],
)  # fmt: skip
def test_depth(model, name, expected):
    assert name in dict(model.named_parameters())
    assert depth(name, model) == expected


def test_unfreezing_goes_from_the_top_down(model):
    unfreeze(model, 0)
    assert not any("resblocks" in name or "embedding" in name for name in trained(model))
    assert {"clip.visual.proj", "clip.text_projection", "clip.logit_scale"} <= trained(model)
    unfreeze(model, 1)
    blocks = {name.split(".ln_1")[0] for name in trained(model) if "ln_1.weight" in name}
    assert blocks == {"clip.visual.transformer.resblocks.2", "clip.transformer.resblocks.1"}
    unfreeze(model, 3)
    assert "clip.token_embedding.weight" in trained(model)
    assert "clip.visual.conv1.weight" not in trained(model)
    unfreeze(model, 4)
    assert len(trained(model)) == len(list(model.parameters()))


def test_learning_rates_fall_with_depth(model):
    settings = replace(TINY, lr=1e-3, head_lr=5e-3, layer_decay=0.5, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["peak_lr"], group["weight_decay"])
        for group in parameter_groups(model, settings)
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    assert found["clip.visual.proj"] == (1e-3, 0.1)
    assert found["clip.visual.transformer.resblocks.1.mlp.c_fc.weight"] == (2.5e-4, 0.1)
    assert found["clip.visual.transformer.resblocks.1.mlp.c_fc.bias"] == (2.5e-4, 0.0)
    assert found["price_head.layers.1.weight"] == (5e-3, 0.1)


def test_saved_model_loads_equal_and_as_open_clip_folder(model, tmp_path):
    model.price_head.start_from(torch.tensor([1.0, 2.0, 4.0]))
    save_model(tmp_path, model)
    loaded, picture = load_model(tmp_path), torch.rand(2, 3, model.side, model.side)
    with torch.no_grad():
        image = model.eval().encode_image(picture)
        assert torch.equal(loaded.encode_image(picture), image)
        assert torch.equal(loaded.price_head.predict(image), model.price_head.predict(image))
        again = build_model(replace(TINY, model=str(tmp_path)))  # a run folder is a --model of its own
        assert torch.equal(again.eval().encode_image(picture), image)
    assert torch.allclose(image.norm(dim=1), torch.ones(2))


def test_predictions_stay_within_the_training_prices(model):
    model.price_head.start_from(torch.tensor([1.0, 4.0]))
    with torch.no_grad():
        predicted = model.price_head.predict(100 * torch.randn(50, model.width))
    assert predicted.min() >= 1.0 and predicted.max() <= 4.0


def test_without_price_weight_there_is_no_head(tmp_path):
    model = build_model(replace(TINY, price_weight=0.0))
    save_model(tmp_path, model)
    assert model.price_head is None and not (tmp_path / HEAD).exists()
    assert load_model(tmp_path).price_head is None


def test_tokenizer_needs_no_network(model):
    tokens = build_tokenizer(TINY, model)(["Granola bars", ""])
    assert tokens.shape == (2, 48) and tokens.max() < 49408


@pytest.mark.parametrize(
    "model, pretrained, message",
    [
        ("/no/such/folder", "", "/no/such/folder: no such local folder"),
        ("ViT-L-14", "/no/such/file.safetensors", "--pretrained /no/such/file.safetensors: no such file"),
        ("ViT-L-14", "no_such_tag", "not a tag of ViT-L-14 .*openai"),
        ("ViT-L-14-quickgelu", "openai", "ViT-L-14-quickgelu openai: not in the local cache"),
        ("nobody/no-such-model", "", "nobody/no-such-model: not in the local cache"),
    ],
)
def test_a_missing_model_is_one_line(model, pretrained, message, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=message) as error:
        build_model(ClipSettings(model=model, pretrained=pretrained))
    assert "\n" not in str(error.value)


def test_an_architecture_that_is_no_vision_transformer_is_refused(model, tmp_path):
    save_model(tmp_path, model)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not a CLIP vision transformer"):
        build_model(replace(TINY, model=str(tmp_path), random_weights=True))
