"""A text encoder, and a head that reads the price from its embedding.

    text -> encoder -> pooled embedding (B, D_in) -+
    quantity, is volume, is weight -> standardise -+-> features (B, D_in + 3) -> head -> log1p(price) (B,)

A run folder stores only what the run has trained: the adapter (or with --train full the encoder), the head, and the
statistics by which the head standardises. Other weights are loaded from where they came from.

Legend: N rows of the table, B batch, T tokens, D_in width of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qwen3_finetune.backbone import build_encoder
from qwen3_finetune.data import N_STRUCTURAL, TextInputs
from qwen3_finetune.spec import EncoderSpec
from training.smape_loss import MIN_LOG_PRICE
from training.weights import disk_errors, read_weights, save_weights


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """(B, T, D_in) to (B, D_in), over the tokens whose mask (B, T) is 1, whichever side the padding is on."""
    attended = attention_mask.bool()
    if pooling == "mean":
        # padded positions may hold NaN, which a product with 0 would keep
        kept = hidden.float().masked_fill(~attended[..., None], 0)
        return kept.sum(1) / attended.sum(1, keepdim=True)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    if pooling == "last":
        token = torch.where(attended, positions, -1).amax(1)
    else:
        token = torch.where(attended, positions, hidden.shape[1]).amin(1)
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, token].float()


class PriceHead(nn.Module):
    """Features (B, D_in + 3) to log1p(price) (B,). An untrained head gives the mean log price of the fit rows.

    Args:
        width: D_in.
        hidden: width of the hidden layer.
    """

    structural_mean: Tensor
    structural_std: Tensor
    log_price_mean: Tensor
    log_price_std: Tensor

    def __init__(self, width: int, *, hidden: int, dropout: float):
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width)
        to_hidden = nn.Linear(width + N_STRUCTURAL, hidden)
        to_price = nn.Linear(hidden, 1)
        nn.init.zeros_(to_price.weight)
        nn.init.zeros_(to_price.bias)
        self.layers = nn.Sequential(nn.Dropout(dropout), to_hidden, nn.GELU(), nn.Dropout(dropout), to_price)
        self.register_buffer("structural_mean", torch.zeros(N_STRUCTURAL))
        self.register_buffer("structural_std", torch.ones(N_STRUCTURAL))
        self.register_buffer("log_price_mean", torch.zeros(()))
        self.register_buffer("log_price_std", torch.ones(()))

    def fit_statistics(self, structural: Tensor, log_price: Tensor) -> None:
        """Set mean and standard deviation of the features (N, 3) and of log price (N,), from the fit rows only."""
        self.structural_mean.copy_(structural.mean(0))
        self.log_price_mean.copy_(log_price.mean())
        # what is the same in all rows, such as "is a volume" in a catalogue of weights, has a deviation of 0
        structural_std = structural.std(0)
        log_price_std = log_price.std()
        self.structural_std.copy_(torch.where(structural_std > 0, structural_std, 1.0))
        self.log_price_std.copy_(torch.where(log_price_std > 0, log_price_std, 1.0))

    def standardise(self, structural: Tensor) -> Tensor:
        """(B, 3) to (B, 3)"""
        return (structural - self.structural_mean) / self.structural_std

    def forward(self, features: Tensor) -> Tensor:
        embedding, structural = features.split([self.width, N_STRUCTURAL], dim=1)
        standard_log_price = self.layers(torch.cat([self.norm(embedding), structural], 1)).squeeze(1)
        return self.log_price_mean + self.log_price_std * standard_log_price


class PriceModel(nn.Module):
    """Encoder, pooling and head.

    Args:
        encoder: a transformers encoder or decoder without a language-model head, possibly wrapped by peft.
        pooling: last, mean or cls.
        padding_side: where the padding of its inputs is; left for decoders.
        token_dropout: share of the tokens that training hides from attention and pooling.
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
        self.encoder = encoder
        self.head = head
        self.pooling = pooling
        self.padding_side = padding_side
        self.token_dropout = token_dropout

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D_in + 3) and log price (B,), float32.

        Args:
            inputs: input_ids (B, T), attention_mask (B, T) and raw structural features (B, 3); or only the features
                (B, D_in + 3) that a frozen encoder computed before.
        """
        features = inputs[0] if len(inputs) == 1 else self.features(*inputs)
        # bf16 keeps three digits: enough inside the encoder, too few for a price
        with torch.autocast(features.device.type, enabled=False):
            return features, self.head(features)

    def features(self, input_ids: Tensor, attention_mask: Tensor, structural: Tensor) -> Tensor:
        """The pooled embedding, then the standardised structural features: (B, D_in + 3) float32."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.padding_side == "left":
            # positions count from the first real token, so padding does not shift them
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        if self.training and self.token_dropout > 0:
            inputs["attention_mask"] = self._hide_tokens(attention_mask)
        hidden = self.encoder(**inputs).last_hidden_state
        embedding = pool(hidden, inputs["attention_mask"], self.pooling)
        return torch.cat([embedding, self.head.standardise(structural)], 1)

    def _hide_tokens(self, attention_mask: Tensor) -> Tensor:
        """The mask (B, T) with a random share of its ones set to 0."""
        keep = torch.rand(attention_mask.shape, device=attention_mask.device) >= self.token_dropout
        # the first and the last token stay: they may be [CLS] and the end token, which pooling reads
        first = attention_mask.cumsum(1) == 1
        last = attention_mask.flip(1).cumsum(1).flip(1) == 1
        return attention_mask * (keep | first | last)

    def train(self, mode: bool = True) -> PriceModel:
        """As usual, except that a frozen encoder stays without dropout."""
        super().train(mode)
        if not any(weight.requires_grad for weight in self.encoder.parameters()):
            self.encoder.eval()
        return self

    @property
    def width(self) -> int:
        """D_in + 3"""
        return self.head.width + N_STRUCTURAL

    def trainable(self) -> dict[str, Tensor]:
        """The weights that are trained, by name."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}


def build_model(
    spec: EncoderSpec,
    device: torch.device,
    vocabulary: int,
    *,
    head_hidden: int,
    head_dropout: float = 0.0,
    token_dropout: float = 0.0,
    seed: int = 0,
) -> PriceModel:
    """Encoder and head on `device`: new ones, or with `spec.trained` those of that run folder.

    Args:
        vocabulary: number of tokens of the tokenizer.
        seed: of the head and of random weights. A random encoder that was not trained is not stored, so opening a run
            takes the seed that training took.
    """
    torch.manual_seed(seed)
    encoder = build_encoder(spec, device, vocabulary)
    head = PriceHead(spec.config.hidden_size, hidden=head_hidden, dropout=head_dropout)
    if spec.trained is not None:
        head.load_state_dict(read_weights(spec.trained / "head.safetensors"))
    model = PriceModel(
        encoder, head, pooling=spec.pooling, padding_side=spec.padding_side, token_dropout=token_dropout
    )
    return model.to(device)


def save_model(model: PriceModel, train: str, folder: Path) -> None:
    """Write what `train` has trained: adapter/ for lora, encoder/ for full, and always head.safetensors."""
    encoder: Any = model.encoder  # of transformers or of peft
    with disk_errors(folder):
        if train == "lora":
            # peft's own choice, "auto", would ask the hub whether the vocabulary has grown
            encoder.save_pretrained(folder / "adapter", save_embedding_layers=False)
        elif train == "full":
            encoder.save_pretrained(folder / "encoder")
    save_weights(folder / "head.safetensors", model.head.state_dict())


@torch.no_grad()
def encode(
    model: PriceModel, inputs: TextInputs, batches: list[np.ndarray], dtype: torch.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (rows (B,), features (B, D_in + 3), log price (B,)), float32, for each batch of row numbers.

    A price is at least one cent, so that every prediction has a ratio to the truth.
    """
    device = model.head.norm.weight.device
    model.eval()
    for rows in tqdm(batches, "texts", unit="batch", delay=2, leave=False):
        tensors = [tensor.to(device) for tensor in inputs(rows)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features, log_price = model(*tensors)
        yield rows, features.cpu().numpy(), log_price.clamp(min=MIN_LOG_PRICE).cpu().numpy()
