"""A small Qwen2.5-VL with random weights and a tokenizer of its own texts: the same classes, without a download."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attributes.chains import END
from attributes.config import SIDE
from training.device import guard_torchvision

guard_torchvision()

MARKS = ("<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Special tokens; the ids 0 to 5."""
PATCH = 28
"""Pixels per side of a patch; 16 vectors per picture, where published models have 64."""


def build_tokenizer(texts: Iterable[str], *, vocabulary: int) -> Any:
    """A byte-level BPE, as Qwen's is, fitted to these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, additional_special_tokens=list(MARKS)
    )


def tiny_config(vocabulary: int, *, width: int, layers: int) -> Any:
    """Shape of the model: a tower and a language model of `layers` layers each."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": MARKS.index(END),
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            # frequencies for time, height and width; together half the width of a head
            "mrope_section": [width // 16, width // 32, width // 32],
        },
    }
    vision = {
        "depth": layers,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_heads": 4,
        "patch_size": PATCH,
        "out_hidden_size": width,
        "window_size": SIDE,
        "fullatt_block_indexes": list(range(layers)),
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=MARKS.index("<|vision_start|>"),
        vision_end_token_id=MARKS.index("<|vision_end|>"),
        image_token_id=MARKS.index("<|image_pad|>"),
        video_token_id=MARKS.index("<|video_pad|>"),
        tie_word_embeddings=True,
    )


def build_tiny(
    texts: Iterable[str], *, vocabulary: int = 512, width: int = 64, layers: int = 2
) -> tuple[Any, Any, Any]:
    """Model with random weights, tokenizer and image processor."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = build_tokenizer(texts, vocabulary=vocabulary)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(len(tokenizer), width=width, layers=layers))
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    )
    return model.eval(), tokenizer, image_processor


def save_tiny(folder: Path, model: Any, tokenizer: Any, image_processor: Any) -> None:
    """Write a folder that `model.load_base` opens like any other checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
