"""The text encoder: where it comes from, how it is quantised, and which of its layers are adapted.

A pretrained base is loaded from the hub's cache or a folder, in NF4 if wanted; --train says whether adapters, all
weights or none of them learn.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
from torch import nn

from contracts.errors import InputError
from contracts.files import read_json
from qwen3_finetune.config import ARCHITECTURES, QwenSettings
from training.device import choose_dtype, guard_torchvision, missing_model, require_model_source

POOLING_NAMES = (
    ("last", "lasttoken", "lasttoken"),
    ("mean", "mean", "mean_tokens"),
    ("cls", "cls", "cls_token"),
)


def is_decoder(config) -> bool:
    """Whether the architecture reads left to right: a language model that is not also a masked one."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    return (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def resolve(settings: QwenSettings, device: torch.device) -> QwenSettings:
    """Replace the two "auto" that depend on machine and network, so that a run is read back as it was trained.

    Raises:
        InputError: --model is neither a folder, nor cached, nor downloadable, or reads fewer than --max-length tokens.
    """
    config = architecture(settings)
    positions = getattr(config, "max_position_embeddings", None) or settings.max_length
    if settings.max_length > positions:
        raise InputError(
            f"--max-length {settings.max_length}: {settings.model} reads at most {positions} tokens"
        )
    quantization = settings.quantization
    if quantization == "auto":
        quantization = "nf4" if device.type == "cuda" and settings.train != "full" else "none"
    pooling = choose_pooling(settings, config) if settings.pooling == "auto" else settings.pooling
    return dataclasses.replace(settings, quantization=quantization, pooling=pooling)


def choose_pooling(settings: QwenSettings, config) -> str:
    """As the model's sentence-transformers file says if it has one, else by architecture."""
    from transformers.utils import cached_file

    stated = None
    if not settings.random_weights:
        stated = cached_file(
            require_model_source(settings.model), "1_Pooling/config.json",
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    if stated is None:
        return "last" if is_decoder(config) else "mean"
    content = read_json(stated)
    # sentence-transformers 6 writes one name, earlier versions one flag a mode
    for pooling, mode, flag in POOLING_NAMES:
        if content.get("pooling_mode") == mode or content.get(f"pooling_mode_{flag}"):
            return pooling
    raise InputError(f"{stated}: neither last-token, mean nor cls pooling; choose one with --pooling")


def architecture(settings: QwenSettings):
    """The transformers config of --model."""
    from transformers import AutoConfig, Qwen3Config

    if settings.random_weights and settings.model in ARCHITECTURES:
        return Qwen3Config(**ARCHITECTURES[settings.model])
    source = require_model_source(settings.model)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise missing_model(settings.model, error) from None


def load_tokenizer(source: str):
    """Raises InputError when there is none. A folder that holds only tokenizer.json (Qwen's, say) will do."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = require_model_source(source)
    folder = Path(source)
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        if "<|endoftext|>" in tokenizer.get_vocab():
            tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise missing_model(source, error) from None


def linear_layers(encoder: nn.Module, wanted: str = "all") -> list[str]:
    """Full names of the encoder's linear layers (4-bit ones too) that get an adapter.

    Args:
        wanted: "all", or last parts of names such as "q_proj,v_proj".

    Raises:
        InputError: for a name that no linear layer has, or no linear layer at all; peft might adapt nothing.
    """
    names = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise InputError(
            f"{type(encoder).__name__} has no linear layers for --train lora; use --train full or head"
        )
    if wanted == "all":
        return names
    suffixes = [suffix.strip() for suffix in wanted.split(",")]
    found = {name.rsplit(".", 1)[-1] for name in names}
    if unknown := [suffix for suffix in suffixes if suffix not in found]:
        raise InputError(
            f"--lora-layers {', '.join(unknown)}: no such linear layer; there are {', '.join(sorted(found))}"
        )
    return [name for name in names if name.rsplit(".", 1)[-1] in suffixes]


def add_lora(encoder: nn.Module, settings: QwenSettings) -> nn.Module:
    """Freeze the encoder and put an adapter on each linear layer (Hu et al. 2021, arXiv:2106.09685)."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        target_modules=linear_layers(encoder, settings.lora_layers),
    )  # fmt: skip
    return get_peft_model(encoder, adapters)


def lora_layers_and_weights(encoder: nn.Module) -> tuple[int, int]:
    """How many layers have an adapter, and how many weights all adapters have."""
    adapters = [weight for name, weight in encoder.named_parameters() if "lora_" in name]
    return len(adapters) // 2, sum(weight.numel() for weight in adapters)


def build_encoder(
    settings: QwenSettings, device: torch.device, vocabulary: int, trained: Path | None = None
) -> nn.Module:
    """The encoder as --model, --random-weights, --quantization and --train of resolved settings say.

    Args:
        vocabulary: tokens of the tokenizer; a random tiny encoder is made to measure.
        trained: run folder whose adapter or encoder is loaded; None builds what training starts from.
    """
    guard_torchvision()
    from transformers import AutoModel, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for each file that is read or written says nothing here

    nf4 = settings.quantization == "nf4"
    # weights that learn stay in float32, autocast computes in bf16; frozen ones need no more than bf16
    dtype = torch.float32 if settings.train == "full" else choose_dtype(settings.precision, device)
    options: dict = {"dtype": dtype}
    if nf4:
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if trained is not None and settings.train == "full":
        encoder = AutoModel.from_pretrained(trained / "encoder", **options)
    elif settings.random_weights:
        encoder = _random_encoder(settings, vocabulary, options, nf4)
    else:
        source = require_model_source(settings.model)
        try:
            encoder = AutoModel.from_pretrained(source, **options)
        except OSError as error:
            raise missing_model(settings.model, error) from None
    rows = encoder.get_input_embeddings().num_embeddings
    if rows < vocabulary:
        raise InputError(f"--tokenizer has {vocabulary} tokens, model {settings.model} knows only {rows}")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # BERT's tanh layer on [CLS]: its output is not used, so it could not learn
    encoder.config.use_cache = False
    if settings.encoder_dropout is not None:
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings.encoder_dropout
    return _prepare_training(encoder, settings, nf4, trained)


def _random_encoder(settings: QwenSettings, vocabulary: int, options: dict, nf4: bool) -> nn.Module:
    from transformers import AutoModel

    config = architecture(settings)
    if not settings.tokenizer:
        config.vocab_size = vocabulary
    encoder = AutoModel.from_config(config)
    if not nf4:
        return encoder.to(options["dtype"])
    with tempfile.TemporaryDirectory() as folder:  # weights are quantised only on their way from a file
        encoder.save_pretrained(folder)
        return AutoModel.from_pretrained(folder, **options)


def _prepare_training(
    encoder: nn.Module, settings: QwenSettings, nf4: bool, trained: Path | None
) -> nn.Module:
    from peft import PeftModel, prepare_model_for_kbit_training

    checkpointing = {"use_reentrant": False}
    if nf4:  # also when the run is only read: it puts the norms in float32, as they were in training
        encoder = prepare_model_for_kbit_training(
            encoder, use_gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_kwargs=checkpointing,
        )  # fmt: skip
    elif settings.gradient_checkpointing:
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    if settings.train == "lora":
        if trained is not None:
            return PeftModel.from_pretrained(encoder, trained / "adapter")
        return add_lora(encoder, settings)
    return encoder.requires_grad_(settings.train == "full")
