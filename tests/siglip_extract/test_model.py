import time

import numpy as np
import pytest
import torch
from PIL import Image

from contracts.errors import InputError
from training.device import guard_torchvision

guard_torchvision()
from transformers import (  # noqa: E402
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
)

from siglip_extract.model import (  # noqa: E402
    END_ID,
    image_tower,
    text_config,
    text_tower,
    train_tokenizer,
    vision_config,
)

CORPUS = [f"Ground coffee number {number}, dark roast, 12 oz (Pack of {number})" for number in range(40)]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint folder as published: both towers in one file, with processor and tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    model = SiglipModel(SiglipConfig(vision_config=vision_config("tiny"), text_config=text_config("tiny")))
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.3] * 3).save_pretrained(folder)
    tokenizer_file = str(train_tokenizer("tiny", CORPUS, folder / "made"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return folder, model.eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_sizes():
    with torch.device("meta"):
        vision = SiglipVisionModel(vision_config("google/siglip-so400m-patch14-384"))
        text = SiglipTextModel(text_config("google/siglip-large-patch16-384"))
    assert vision.config.hidden_size == 1152 and parameters(vision) == 428_225_600
    assert text.config.projection_size == 1024 and parameters(text) == 336_194_560
    assert text.config.max_position_embeddings == 64


def test_towers_of_a_full_checkpoint_equal_the_full_model(checkpoint):
    folder, model = checkpoint
    image, text = image_tower(str(folder)), text_tower(str(folder))
    assert isinstance(image.model, SiglipVisionModel) and isinstance(text.model, SiglipTextModel)
    pixels, ids = image.prepare(PICTURE)[None], text.prepare(CORPUS[:3])
    with torch.inference_mode():
        expected_image = model.get_image_features(pixel_values=(pixels / 255 - 0.3) / 0.5).pooler_output
        expected_text = model.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(image(pixels), expected_image)
        torch.testing.assert_close(text(ids), expected_text)
    assert expected_image.shape == (1, image.width) and expected_text.shape == (3, text.width)


def test_pictures_are_normalised_as_the_checkpoint_says(checkpoint):
    white = Image.new("RGB", (200, 100), "white")
    for tower, expected in (
        (image_tower(str(checkpoint[0])), 1.4),
        (image_tower("tiny", random_weights=True), 1.0),
    ):
        pixels = tower.prepare(white)[None]
        assert pixels.dtype == torch.uint8
        torch.testing.assert_close(tower.normalise(pixels), torch.full((1, 3, 64, 64), expected))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 3), (3, 5), (3000, 1)])
def test_odd_picture_shapes(size):
    red = image_tower("tiny", random_weights=True).prepare(Image.new("RGB", size, "red"))
    expected = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 64)
    torch.testing.assert_close(red, expected)


def test_texts_are_padded_to_64_tokens_whatever_their_neighbours(tmp_path):
    tokenizer_file = train_tokenizer("tiny", CORPUS, tmp_path)
    tower = text_tower("tiny", random_weights=True, tokenizer_file=tokenizer_file)
    alone = tower.prepare(["Ground coffee"])
    beside = tower.prepare(["Ground coffee", " ".join(CORPUS)])
    assert alone.shape == (1, 64) and beside.shape == (2, 64)
    assert torch.equal(alone[0], beside[0])
    words = (alone[0] != END_ID).sum()
    assert 0 < words < 10 and (alone[0, words:] == END_ID).all()
    assert beside[1, -1] == END_ID and (beside[1, :-1] != END_ID).all()


def test_tokenizer_is_trained_once_per_corpus(tmp_path):
    first = train_tokenizer("tiny", CORPUS, tmp_path)
    before = first.stat().st_mtime_ns
    assert train_tokenizer("tiny", CORPUS, tmp_path) == first and first.stat().st_mtime_ns == before
    other = train_tokenizer("tiny", [*CORPUS, "another text"], tmp_path)
    assert other != first and sorted(tmp_path.iterdir()) == sorted([first, other])


def test_a_random_text_tower_without_its_tokenizer_is_one_line(tmp_path):
    with pytest.raises(InputError, match="absent.json: no such tokenizer"):
        text_tower("tiny", random_weights=True, tokenizer_file=tmp_path / "absent.json")
    with pytest.raises(InputError, match="needs the file of its tokenizer"):
        text_tower("tiny", random_weights=True)


def test_checkpoint_identifies_weights_and_vocabulary(tmp_path):
    def tower(seed, corpus=CORPUS):
        torch.manual_seed(seed)
        tokenizer_file = train_tokenizer("tiny", corpus, tmp_path)
        return text_tower("tiny", random_weights=True, tokenizer_file=tokenizer_file).checkpoint()

    assert tower(0) == tower(0)
    assert len({tower(0), tower(1), tower(0, CORPUS[:5])}) == 3


@pytest.mark.parametrize("load", [image_tower, text_tower])
def test_missing_models(load, tmp_path):
    with pytest.raises(InputError, match="nobody/nothing: not in the local cache") as error:
        load("nobody/nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such local folder"):
        load(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="knows the architectures .*tiny"):
        load("nobody/nothing", random_weights=True)


def test_checkpoints_of_another_kind_are_rejected(tmp_path, checkpoint):
    CLIPVisionModel(CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=1)).save_pretrained(tmp_path / "clip")  # fmt: skip
    with pytest.raises(InputError, match="clip_vision_model checkpoint"):
        image_tower(str(tmp_path / "clip"))
    # a text tower alone, under the configuration of both towers
    folder, model = checkpoint
    model.text_model.save_pretrained(tmp_path / "half")
    model.config.save_pretrained(tmp_path / "half")
    with pytest.raises(InputError, match="weights of this tower are missing or misshapen"):
        image_tower(str(tmp_path / "half"))


def test_a_word_of_300_kilobytes_takes_no_time(tmp_path):
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), 300_000)
    started = time.monotonic()
    path = train_tokenizer("tiny", ["green tea"] * 50 + ["".join(letters)], tmp_path)
    tower = text_tower("tiny", random_weights=True, tokenizer_file=path)
    assert tower.prepare(["".join(letters)]).shape[0] == 1
    assert time.monotonic() - started < 20
