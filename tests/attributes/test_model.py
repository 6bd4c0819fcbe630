"""The model: adapters, cached pictures, positions, sampler, log-probabilities."""

import numpy as np
import pytest
import torch
from PIL import Image

from attributes.chains import Question
from attributes.data import Listing
from attributes.model import add_lora, picture_outputs, read_square, trained_weights
from attributes.sample_world import attribute_of
from attributes.sampling import choose, draw, random_numbers
from training.pictures import UnreadablePicture

TONE = attribute_of("colour")


def build_empty(shape):
    """A published model without memory for its weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**shape))


QWEN_2_5_3B = {
    "model_type": "qwen2_5_vl", "tie_word_embeddings": True,
    "text_config": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048, "depth": 32},
}  # fmt: skip
QWEN_2_2B = {
    "model_type": "qwen2_vl", "tie_word_embeddings": True,
    "text_config": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
    "vision_config": {"embed_dim": 1280, "hidden_size": 1536, "depth": 32},
}  # fmt: skip


@pytest.mark.parametrize(("shape", "trained"), [(QWEN_2_5_3B, 7_372_800), (QWEN_2_2B, 4_358_144)])
def test_trainable_weights_of_the_published_models(shape, trained):
    weights = trained_weights(add_lora(build_empty(shape), rank=32, alpha=32))
    assert sum(weight.numel() for weight in weights.values()) == trained
    assert not any("visual" in name for name in weights)


def questions(language, counts):
    """One question per count of pictures, with texts of different lengths."""
    names = sorted(path.name for path in language.images.iterdir())
    made = []
    for number, count in enumerate(counts):
        listing = Listing(f"q{number}", "buttons", "word " * number, tuple(names[:count]))
        made.append(Question(listing, TONE))
    language.show(names[:5])
    return made


def test_cached_vectors_give_what_the_full_forward_gives(language):
    (question,) = questions(language, [2])
    batch = language.batch([language.prompt(question)])
    squares = [read_square(language.images, name, "pad") for name in question.listing.pictures]
    inputs = language.image_processor(images=squares, do_resize=False, return_tensors="pt")
    with torch.no_grad():
        cached = language.logits(batch, keep=1)
        full = language.model(
            input_ids=batch.input_ids, attention_mask=batch.valid.long(), pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            mm_token_type_ids=(batch.input_ids == language.image_token).int(),
        ).logits[:, -1:]  # fmt: skip
        without = language.model(
            input_ids=batch.input_ids, attention_mask=batch.valid.long(),
            mm_encoder_outputs=picture_outputs(batch.pictures),
        ).logits[:, -1:]  # fmt: skip
    torch.testing.assert_close(cached, full, rtol=0, atol=1e-5)
    # without the kinds of tokens the library falls back to plain positions and says nothing
    assert (without - full).abs().max() > 1e-4


def test_a_picture_goes_through_the_tower_once(language, monkeypatch):
    seen = []
    encode = language.encode
    monkeypatch.setattr(language, "encode", lambda squares: seen.append(len(squares)) or encode(squares))
    (question,) = questions(language, [3])
    language.show(question.listing.pictures)
    assert sum(seen) == 5


def test_no_one_and_five_pictures_in_a_batch(language):
    asked = [language.prompt(question) for question in questions(language, [0, 1, 5])]
    replies = [[7, 8, 9, language.end_token], [7], [9, 9]]
    with torch.no_grad():
        together, exist = language.log_probabilities(asked, replies)
        for row, reply in enumerate(replies):
            alone, _ = language.log_probabilities([asked[row]], [reply])
            torch.testing.assert_close(together[row, : len(reply)], alone[0], rtol=0, atol=1e-4)
    assert exist.sum(dim=1).tolist() == [4, 1, 2]


def test_the_sampler_agrees_with_the_full_forward_under_left_padding(language):
    own = questions(language, [0, 1, 3])
    asked = [language.prompt(question) for question in own]
    numbers = np.stack([random_numbers(0, *question.key, 0, chains=7, tokens=12) for question in own])
    replies = draw(language, asked, numbers=numbers, max_new_tokens=12)
    flat = [reply for of_question in replies for reply in of_question]
    with torch.no_grad():
        of_tokens, _ = language.log_probabilities(
            [each for each in asked for _ in range(7)], [reply.ids for reply in flat]
        )
    expected = torch.tensor([reply.log_probability for reply in flat])
    torch.testing.assert_close(of_tokens.sum(dim=1), expected, rtol=0, atol=1e-3)


def test_chains_differ_whatever_generation_config_says(language):
    language.base.generation_config.top_k = 1
    language.base.generation_config.repetition_penalty = 5.0
    own = questions(language, [1])
    numbers = random_numbers(0, "q0", "tone", 0, chains=7, tokens=10)[None]
    (replies,) = draw(language, [language.prompt(own[0])], numbers=numbers, max_new_tokens=10)
    assert len({reply.ids for reply in replies}) == 7
    (same,) = draw(language, [language.prompt(own[0])], numbers=numbers, max_new_tokens=10)
    assert same == replies
    (cold,) = draw(language, [language.prompt(own[0])], numbers=numbers, max_new_tokens=10, temperature=1e-4)
    (greedy,) = draw(language, [language.prompt(own[0])], numbers=None, max_new_tokens=10)
    assert {reply.ids for reply in cold} == {greedy[0].ids}


def test_tokens_are_drawn_as_often_as_they_are_probable():
    numbers = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    logits = torch.tensor([0.5, 0.2, 0.3]).log().expand(1000, 3)
    counts = choose(logits, numbers, 1.0).bincount()
    assert counts.tolist() == pytest.approx([500, 200, 300], abs=1)


def test_random_numbers_depend_on_their_question_alone():
    seven = random_numbers(0, "a", "tone", 0, chains=7, tokens=5)
    assert np.array_equal(random_numbers(0, "a", "tone", 0, chains=3, tokens=5), seven[:3])
    for other in [(1, "a", "tone", 0), (0, "b", "tone", 0), (0, "a", "form", 0), (0, "a", "tone", 1)]:
        assert not np.array_equal(random_numbers(*other, chains=7, tokens=5), seven)


def test_every_picture_becomes_a_square(tmp_path):
    Image.new("RGB", (2000, 8), "black").save(tmp_path / "long.png")
    assert read_square(tmp_path, "long.png", "stretch").getextrema() == ((0, 0),) * 3
    padded = read_square(tmp_path, "long.png", "pad")
    assert padded.size == (224, 224)
    assert padded.getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "broken.png").write_bytes(b"<html>")
    with pytest.raises(UnreadablePicture):
        read_square(tmp_path, "broken.png", "pad")
