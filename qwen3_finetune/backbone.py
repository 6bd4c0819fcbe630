"""Builds the text encoder of an `EncoderSpec`: loaded or random, in 4 bits or not, with adapters or without."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from contracts.errors import InputError
from qwen3_finetune.spec import EncoderSpec
from training.device import guard_torchvision, missing_model, require_model_source

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or a local folder, of which tokenizer.json alone is enough.

    Raises InputError when there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = require_model_source(source)
    folder = Path(source)
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        # such a folder does not name its special tokens; this is the end token of Qwen's
        if "<|endoftext|>" in tokenizer.get_vocab():
            tokenizer.eos_token = "<|endoftext|>"
            tokenizer.pad_token = "<|endoftext|>"
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise missing_model(source, error) from None


def build_encoder(spec: EncoderSpec, device: torch.device, vocabulary: int) -> nn.Module:
    """The encoder that training starts from, or with `spec.trained` the one that training left.

    Random weights are drawn from torch's generator, so the caller sets its seed.

    Args:
        vocabulary: number of tokens of the tokenizer.

    Raises:
        InputError: the model is not there, or knows fewer tokens than the tokenizer.
    """
    guard_torchvision()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar per file that is read or written says nothing here

    if spec.trained is not None and spec.train == "full":
        encoder = _load(str(spec.trained / "encoder"), spec, device)
    elif spec.random_weights:
        encoder = _draw(spec, device, vocabulary)
    else:
        encoder = _load(spec.model, spec, device)

    embeddings = encoder.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if embeddings.num_embeddings < vocabulary:
        raise InputError(
            f"--tokenizer has {vocabulary} tokens, model {spec.model} knows only {embeddings.num_embeddings}"
        )
    if getattr(encoder, "pooler", None) is not None:
        # BERT's tanh layer on [CLS]: its output is not used, so it could not learn
        encoder.pooler = None  # type: ignore[assignment]
    encoder.config.use_cache = False
    if spec.dropout is not None:
        _set_dropout(encoder, spec.dropout)

    _prepare_for_training(encoder, spec)
    if spec.train == "lora":
        return add_lora(encoder, spec)
    return encoder.requires_grad_(spec.train == "full")


def _load(source: str, spec: EncoderSpec, device: torch.device) -> PreTrainedModel:
    """Pretrained or stored weights, quantised on the way from the file if the spec says so."""
    from transformers import AutoModel

    options: dict[str, Any] = {"dtype": spec.weights_dtype}
    if spec.quantization == "nf4":
        options["device_map"] = {"": device}
        options["quantization_config"] = nf4(spec)
    try:
        return AutoModel.from_pretrained(require_model_source(source), **options)
    except OSError as error:
        raise missing_model(source, error) from None


def nf4(spec: EncoderSpec) -> BitsAndBytesConfig:
    """4-bit NormalFloat weights with quantised constants (Dettmers et al. 2023, arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=spec.weights_dtype,
    )


def _draw(spec: EncoderSpec, device: torch.device, vocabulary: int) -> PreTrainedModel:
    """Random weights."""
    from transformers import AutoModel

    config = copy.deepcopy(spec.config)
    if not spec.tokenizer:
        config.vocab_size = (
            vocabulary  # a tokenizer that was learnt from few texts is smaller than the architecture's
        )
    encoder = AutoModel.from_config(config)
    if spec.quantization == "none":
        return encoder.to(spec.weights_dtype)
    # bitsandbytes quantises weights only while they are loaded
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        return _load(folder, spec, device)


def _set_dropout(encoder: nn.Module, dropout: float) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


def _prepare_for_training(encoder: PreTrainedModel, spec: EncoderSpec) -> None:
    """Change the encoder in place, also when a run is only read: its norms have to be what they were in training."""
    from peft import prepare_model_for_kbit_training

    checkpointing = {"use_reentrant": False}
    if spec.quantization == "nf4":
        prepare_model_for_kbit_training(
            encoder,
            use_gradient_checkpointing=spec.gradient_checkpointing,
            gradient_checkpointing_kwargs=checkpointing,
        )
    elif spec.gradient_checkpointing:
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)


def add_lora(encoder: nn.Module, spec: EncoderSpec) -> nn.Module:
    """Freeze the encoder and give its linear layers adapters (Hu et al. 2021, arXiv:2106.09685), new or trained."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if spec.trained is not None:
        return PeftModel.from_pretrained(encoder, str(spec.trained / "adapter"))
    adapters = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,  # type: ignore[arg-type]  # peft says int and only divides by the rank
        lora_dropout=spec.lora_dropout,
        target_modules=linear_layers(encoder, spec.target_modules),
    )
    return get_peft_model(encoder, adapters)


def linear_layers(encoder: nn.Module, wanted: str = "all-linear") -> list[str]:
    """Full names of the linear layers, also those in 4 bits, that get an adapter.

    Args:
        wanted: "all-linear", or the last parts of names such as "q_proj,v_proj".

    Raises:
        InputError: no linear layer has such a name, or there is none at all; peft might then adapt nothing.
    """
    names = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise InputError(
            f"{type(encoder).__name__} has no linear layers for --train lora; use --train full or head"
        )
    if wanted == "all-linear":
        return names
    suffixes = [suffix.strip() for suffix in wanted.split(",")]
    found = {name.rsplit(".", 1)[-1] for name in names}
    if unknown := [suffix for suffix in suffixes if suffix not in found]:
        raise InputError(
            f"--target-modules {', '.join(unknown)}: no such linear layer; there are {', '.join(sorted(found))}"
        )
    return [name for name in names if name.rsplit(".", 1)[-1] in suffixes]


def count_adapters(encoder: nn.Module) -> tuple[int, int]:
    """How many layers have an adapter, and how many weights all adapters have."""
    weights = [weight for name, weight in encoder.named_parameters() if "lora_" in name]
    matrices_per_adapter = 2  # A and B
    return len(weights) // matrices_per_adapter, sum(weight.numel() for weight in weights)
