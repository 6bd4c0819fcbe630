"""A text encoder with LoRA adapters, and a head that reads the price from its embedding.

    text -> encoder -> pooled embedding (B, D_in) -+
    quantity, is volume, is weight -> standardise -+-> features (B, D_in + 3) -> head -> log1p(price) (B,)

What a run trains is all it stores: adapter (or the whole encoder with --train full), head, and the statistics
by which the head standardises. A pretrained base is loaded again from where it came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from contracts.files import sha256_file
from qwen3_finetune.config import QwenSettings
from qwen3_finetune.data import TextInputs
from qwen3_finetune.encoder import build_encoder, is_decoder
from qwen3_finetune.loss import MIN_LOG_PRICE

N_STRUCTURAL = 3


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
