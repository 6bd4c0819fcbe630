"""The text encoder of a run: where it comes from, what of it is trained, and how a chunk becomes one vector.

Legend: B rows, C chunks, T tokens, H encoder width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from contracts.errors import InputError
from text_tabular.config import TextTabularSettings
from training.device import guard_torchvision, missing_model, require_model_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer"
"""Folder in a run folder with the tokenizer, whether it was trained here or came with the encoder."""
CONFIG = "encoder.json"
"""File in a run folder with the shape of the encoder."""
SMALL_BERT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VOCABULARY = 2000
"""Most words of a tokenizer that is trained on the texts of a run."""
LONGEST_TEXT = 20_000
"""Characters of a text that such a tokenizer learns from."""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A tokenizer of whole words from these texts, for an encoder with random weights, which needs no download.

    Word pieces would be divided differently from run to run, as their trainer breaks ties at random.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = Tokenizer(models.WordLevel(unk_token=special["unk_token"]))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=VOCABULARY, min_frequency=2, special_tokens=list(special.values()), show_progress=False
    )
    words.train_from_iterator((text[:LONGEST_TEXT] for text in texts), trainer)
    sep: Any = words.token_to_id("[SEP]")
    cls: Any = words.token_to_id("[CLS]")
    words.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def load_tokenizer(settings: TextTabularSettings, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of --model; without one, a tokenizer trained on `texts`."""
    if not settings.model:
        return train_tokenizer(texts)
    from transformers import AutoTokenizer

    source = require_model_source(settings.model)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise missing_model(settings.model, error) from None


def load_encoder(settings: TextTabularSettings, words: int) -> nn.Module:
    """The encoder of --model, or one with random weights.

    Args:
        words: size of the tokenizer's vocabulary, for an encoder that has no shape of its own.
    """
    guard_torchvision()
    from transformers import AutoConfig, AutoModel, BertConfig

    if not settings.model:
        config: Any = BertConfig(vocab_size=words, max_position_embeddings=512, **SMALL_BERT)
        return AutoModel.from_config(config, attn_implementation="sdpa")
    source = require_model_source(settings.model)
    try:
        if settings.random_weights:
            return AutoModel.from_config(AutoConfig.from_pretrained(source))
        return AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise missing_model(settings.model, error) from None


def rebuild_encoder(folder: Path) -> nn.Module:
    """The encoder of a finished run, of the right shape and without its weights."""
    guard_torchvision()
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.from_pretrained(folder / CONFIG))


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """The encoder's layers, lowest first. Raises InputError for an architecture whose layers are not a list."""
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError("--frozen-layers: the layers of this encoder are not known")
    return max(lists, key=len)


def choose_trained(encoder: Any, settings: TextTabularSettings) -> nn.Module:
    """Freeze what is not trained, and add LoRA adapters where they are; returns the encoder to use."""
    if settings.tuning == "head":
        encoder.requires_grad_(False)
        return encoder
    if settings.tuning == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
        adapted: Any = get_peft_model(encoder, config)
        return adapted.base_model.model
    layers = layers_of(encoder)
    if settings.frozen_layers > len(layers):
        raise InputError(f"--frozen-layers {settings.frozen_layers}: the encoder has {len(layers)} layers")
    if settings.frozen_layers:
        encoder.get_input_embeddings().requires_grad_(False)
        for layer in layers[: settings.frozen_layers]:
            layer.requires_grad_(False)
    if settings.gradient_checkpointing:
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return encoder


def pool(encoder: nn.Module, tokens: Tensor, valid: Tensor, pooling: str) -> Tensor:
    """One vector per chunk.

    Args:
        tokens, valid: (chunks, T) ids, and which of them are no padding.
        pooling: mean over the tokens, or the encoder's pooler_output.

    Returns:
        (chunks, H)

    Raises:
        InputError: the encoder has no pooler.
    """
    output = encoder(input_ids=tokens, attention_mask=valid.long())
    if pooling == "pooler":
        if getattr(output, "pooler_output", None) is None:
            raise InputError("--pooling pooler: this encoder has none; use --pooling mean")
        return output.pooler_output
    weights = valid.unsqueeze(2).to(output.last_hidden_state.dtype)  # (chunks, T, 1)
    return (output.last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
