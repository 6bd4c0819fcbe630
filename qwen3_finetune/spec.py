"""What an encoder is, decided once: where it comes from, how it is stored, and which of its weights are trained.

`EncoderSpec.resolve` replaces the settings that say "auto" and reads the architecture. Everything that builds or loads
the encoder and its tokenizer works from the spec, in training and when a finished run is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from contracts.errors import InputError
from contracts.files import read_json
from qwen3_finetune.config import ARCHITECTURES, QwenSettings
from training.device import choose_dtype, missing_model, require_model_source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Pooling = Literal["last", "mean", "cls"]

# Our name, the name in files of sentence-transformers 6, and the flag in files of earlier versions.
POOLING_NAMES: tuple[tuple[Pooling, str, str], ...] = (
    ("last", "lasttoken", "pooling_mode_lasttoken"),
    ("mean", "mean", "pooling_mode_mean_tokens"),
    ("cls", "cls", "pooling_mode_cls_token"),
)


@dataclass(frozen=True)
class EncoderSpec:
    """A text encoder with nothing left to decide."""

    model: str
    """hub id or local folder, or with random weights a name in config.ARCHITECTURES"""
    config: PretrainedConfig
    """the architecture"""
    random_weights: bool
    """draw the weights instead of loading pretrained ones"""
    trained: Path | None
    """run folder that holds the trained weights; None builds the encoder that training starts from"""
    tokenizer: str
    """hub id or local folder; empty: it was learnt from the texts of the fit rows and lies in the run folder"""
    max_length: int
    """tokens per text"""
    instruction: str
    """what the encoder is told before each text"""
    pooling: Pooling
    """how token vectors become one embedding"""
    quantization: Literal["nf4", "none"]
    """how frozen weights are stored"""
    dtype: torch.dtype
    """of the computation, under autocast"""
    train: Literal["lora", "full", "head"]
    """what is trained besides the head"""
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str
    """the linear layers that get an adapter"""
    dropout: float | None
    """dropout in the encoder; None keeps that of the architecture"""
    gradient_checkpointing: bool

    @classmethod
    def resolve(
        cls, settings: QwenSettings, device: torch.device, trained: Path | None = None
    ) -> EncoderSpec:
        """Decide what the settings leave open.

        Args:
            device: the weights are quantised by default only where it is a CUDA device.
            trained: run folder of a finished run with these settings, to open it.

        Raises:
            InputError: the model is neither a folder, nor cached, nor downloadable, or reads fewer than --max-length
                tokens.
        """
        if trained is not None and settings.train == "full":
            config = _read_config(str(trained / "encoder"))
        else:
            config = architecture(settings.model, random_weights=settings.random_weights)
        positions = getattr(config, "max_position_embeddings", None)
        if positions and settings.max_length > positions:
            raise InputError(
                f"--max-length {settings.max_length}: {settings.model} reads at most {positions} tokens"
            )

        pooling = settings.pooling
        if pooling == "auto":
            stated = None if settings.random_weights else _stated_pooling(settings.model)
            pooling = stated or ("last" if is_decoder(config) else "mean")
        quantization = settings.quantization
        if quantization == "auto":
            quantization = "nf4" if device.type == "cuda" and settings.train != "full" else "none"
        tokenizer = settings.tokenizer
        if not tokenizer and not settings.random_weights:
            tokenizer = settings.model

        return cls(
            model=settings.model,
            config=config,
            random_weights=settings.random_weights,
            trained=trained,
            tokenizer=tokenizer,
            max_length=settings.max_length,
            instruction=settings.instruction,
            pooling=pooling,
            quantization=quantization,
            dtype=choose_dtype(settings.precision, device),
            train=settings.train,
            lora_rank=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.target_modules,
            dropout=settings.encoder_dropout,
            gradient_checkpointing=settings.gradient_checkpointing,
        )

    @property
    def weights_dtype(self) -> torch.dtype:
        """Weights that are trained stay in float32, and autocast computes in bf16; frozen ones need only bf16."""
        return torch.float32 if self.train == "full" else self.dtype

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """A decoder is padded on the left, so that its last position is the last token of every text."""
        return "left" if is_decoder(self.config) else "right"

    def tokenizer_source(self, run_folder: Path) -> str:
        """Where the tokenizer of the run in this folder is."""
        return self.tokenizer or str(run_folder / "tokenizer")


def architecture(model: str, *, random_weights: bool) -> PretrainedConfig:
    """The transformers config of a model. Raises InputError when it can be neither built nor found."""
    from transformers import Qwen3Config

    if random_weights and model in ARCHITECTURES:
        return Qwen3Config(**ARCHITECTURES[model])
    return _read_config(model)


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether the architecture reads from left to right: a causal language model that is not also a masked one."""
    from transformers.models.auto import modeling_auto

    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return causal and not masked


def _read_config(model: str) -> PretrainedConfig:
    from transformers import AutoConfig

    source = require_model_source(model)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise missing_model(model, error) from None


def _stated_pooling(model: str) -> Pooling | None:
    """The pooling in the model's sentence-transformers file; None where it has no such file."""
    from transformers.utils import cached_file

    path = cached_file(
        require_model_source(model),
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    content = read_json(path)
    for pooling, mode, flag in POOLING_NAMES:
        if content.get("pooling_mode") == mode or content.get(flag):
            return pooling
    raise InputError(f"{path}: neither last-token, mean nor cls pooling; choose one with --pooling")
