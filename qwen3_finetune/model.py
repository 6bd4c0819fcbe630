"""A text encoder with LoRA adapters, and a head that reads the price from its embedding.

    text -> encoder -> pooled embedding (B, D_in) -+
    quantity, is volume, is weight -> standardise -+-> features (B, D_in + 3) -> head -> log1p(price) (B,)

What a run trains is all it stores: adapter (or the whole encoder with --train full), head, and the statistics
by which the head standardises. A pretrained base is loaded again from where it came.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from contracts.errors import InputError
from contracts.files import read_json, sha256_file
from contracts.torch_setup import choose_dtype, guard_torchvision, missing_model, require_model_source
from qwen3_finetune.config import ARCHITECTURES, QwenSettings
from qwen3_finetune.data import TextInputs
from qwen3_finetune.loss import MIN_LOG_PRICE

N_STRUCTURAL = 3
POOLING_NAMES = (
    ("last", "lasttoken", "lasttoken"),
    ("mean", "mean", "mean_tokens"),
    ("cls", "cls", "cls_token"),
)


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """(B, T, D_in) to (B, D_in) over the tokens whose mask is 1, wherever the padding stands."""
    if pooling == "mean":
        mask = attention_mask[..., None].bool()
        return hidden.float().masked_fill(~mask, 0).sum(1) / mask.sum(1)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    attended = attention_mask.bool()
    if pooling == "last":
        token = torch.where(attended, positions, -1).amax(1)
    else:
        token = torch.where(attended, positions, hidden.shape[1]).amin(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), token].float()


class PriceHead(nn.Module):
    """Features (B, D_in + 3) to log1p(price) (B,); starts at the mean log price of the fit rows."""

    def __init__(self, width: int, *, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width + N_STRUCTURAL, hidden), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(hidden, 1),
        )  # fmt: skip
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        self.register_buffer("structural_mean", torch.zeros(N_STRUCTURAL))
        self.register_buffer("structural_std", torch.ones(N_STRUCTURAL))
        self.register_buffer("log_price_mean", torch.zeros(()))
        self.register_buffer("log_price_std", torch.ones(()))

    def fit_statistics(self, structural: Tensor, log_price: Tensor) -> None:
        """Set the mean and standard deviation of the features (N, 3) and of log price (N,), from fit rows only."""
        std = structural.std(0)
        self.structural_mean.copy_(structural.mean(0))
        self.structural_std.copy_(torch.where(std > 0, std, 1.0))  # no row is a volume: leave the zeros
        self.log_price_mean.copy_(log_price.mean())
        self.log_price_std.copy_(log_price.std() if log_price.std() > 0 else 1.0)

    def standardise(self, structural: Tensor) -> Tensor:
        return (structural - self.structural_mean) / self.structural_std

    def forward(self, features: Tensor) -> Tensor:
        embedding, structural = features.split([features.shape[1] - N_STRUCTURAL, N_STRUCTURAL], dim=1)
        standard_log_price = self.layers(torch.cat([self.norm(embedding), structural], 1)).squeeze(1)
        return self.log_price_mean + self.log_price_std * standard_log_price


class PriceModel(nn.Module):
    """Encoder, pooling and head.

    Args:
        encoder: a transformers encoder or decoder without a language-model head, perhaps wrapped by peft.
        pooling: last, mean or cls.
        padding_side: left for decoders: positions are then counted from the first real token.
        token_dropout: share of tokens that training hides from attention and pooling.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: PriceHead,
        *,
        pooling: str,
        padding_side: str,
        token_dropout: float = 0.0,
    ):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.pooling, self.padding_side, self.token_dropout = pooling, padding_side, token_dropout

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D_in + 3) and log price (B,), float32.

        Args:
            inputs: input_ids (B, T), attention_mask (B, T) and raw structural features (B, 3); or only features
                (B, D_in + 3), computed before, as a frozen encoder allows.
        """
        # bf16 keeps three digits: enough inside the encoder, too few for a price
        features = inputs[0] if len(inputs) == 1 else self.features(*inputs)
        with torch.autocast(features.device.type, enabled=False):
            return features, self.head(features)

    def features(self, input_ids: Tensor, attention_mask: Tensor, structural: Tensor) -> Tensor:
        """Pooled embedding, then the standardised structural features: (B, D_in + 3) float32."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.padding_side == "left":
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        if self.training and self.token_dropout > 0:
            inputs["attention_mask"] = self._hide_tokens(attention_mask)
        hidden = self.encoder(**inputs).last_hidden_state
        embedding = pool(hidden, inputs["attention_mask"], self.pooling)
        return torch.cat([embedding, self.head.standardise(structural)], 1)

    def _hide_tokens(self, attention_mask: Tensor) -> Tensor:
        keep = torch.rand(attention_mask.shape, device=attention_mask.device) >= self.token_dropout
        first = attention_mask.cumsum(1) == 1
        last = attention_mask.flip(1).cumsum(1).flip(1) == 1
        return attention_mask * (keep | first | last)  # the ends carry [CLS] and the end token

    def train(self, mode: bool = True) -> PriceModel:
        """As usual, but a frozen encoder stays without dropout."""
        super().train(mode)
        if not any(weight.requires_grad for weight in self.encoder.parameters()):
            self.encoder.eval()
        return self

    @property
    def width(self) -> int:
        """D_in + 3"""
        return self.encoder.config.hidden_size + N_STRUCTURAL

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}


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


def build_model(
    settings: QwenSettings, device: torch.device, vocabulary: int, trained: Path | None = None
) -> PriceModel:
    """Encoder and head on `device`; with `trained`, as that run folder holds them."""
    torch.manual_seed(settings.seed)  # a random encoder that was not stored is drawn again, so it comes first
    encoder = build_encoder(settings, device, vocabulary, trained)
    head = PriceHead(encoder.config.hidden_size, hidden=settings.head_hidden, dropout=settings.head_dropout)
    if trained is not None:
        head.load_state_dict(load_file(trained / "head.safetensors"))
    model = PriceModel(
        encoder, head, pooling=settings.pooling, token_dropout=settings.token_dropout,
        padding_side="left" if is_decoder(encoder.config) else "right",
    )  # fmt: skip
    return model.to(device)


def save_model(model: PriceModel, settings: QwenSettings, folder: Path) -> None:
    """Write what was trained: adapter/ or encoder/, and head.safetensors."""
    if settings.train == "lora":
        model.encoder.save_pretrained(folder / "adapter", save_embedding_layers=False)
    elif settings.train == "full":
        model.encoder.save_pretrained(folder / "encoder")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.head.state_dict().items()},
        folder / "head.safetensors",
    )


def checkpoint_hash(folder: Path) -> str:
    """Identifies the trained weights, for the meta of what is made with them."""
    files = sorted(folder.rglob("*.safetensors"))
    digests = [f"{file.relative_to(folder).as_posix()} {sha256_file(file)}" for file in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


@torch.no_grad()
def encode(
    model: PriceModel, inputs: TextInputs, batches: list[np.ndarray], dtype: torch.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (rows, features (B, D_in + 3), log price (B,)), float32, of each batch of row numbers.

    A price is at least one cent, so that every prediction has a ratio to the truth.
    """
    device = model.head.norm.weight.device
    model.eval()
    for rows in tqdm(batches, "texts", unit="batch", delay=2, leave=False):
        tensors = [tensor.to(device) for tensor in inputs(rows)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features, log_price = model(*tensors)
        yield rows, features.cpu().numpy(), log_price.clamp(min=MIN_LOG_PRICE).cpu().numpy()
