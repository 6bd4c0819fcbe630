"""Text and fields into one decision: two branches and a fusion design.

    messages ── chunks ── encoder ── mean over chunks ── Linear H ─┐
                                                                   ├─ design ── logits (B, K) or a number (B,)
    fields ─────────────── LayerNorm ── Linear ── ReLU ────────────┘

The four designs are those of the fusion of two embeddings (fusion/qwen_clip). With H = F = 100 and three classes they
have 603 (concat), 40,500 + 303 (gate), 402 + 303 (moe) and 81,200 + 20,403 (cross_attention) parameters.

Legend: B rows, C chunks, T tokens, H width of either branch, F width of design gate, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.blocks import OutputLinear, zero_missing
from fusion.qwen_clip.chunks import average_chunks
from fusion.qwen_clip.concat import ConcatFusion
from fusion.qwen_clip.cross_attention import CrossAttentionFusion
from fusion.qwen_clip.gate import GateFusion
from fusion.qwen_clip.moe import MoEFusion
from fusion.tabular import TabularBranch
from text_tabular.config import TextTabularSettings
from text_tabular.encoder import pool


@dataclass
class Batch:
    """B rows as tensors."""

    tokens: Tensor
    """(chunks of all rows, T) int64"""
    token_valid: Tensor
    """(chunks of all rows, T) bool"""
    chunk_valid: Tensor
    """(B, C) bool: which chunks a row has; the chunks lie in `tokens` row by row"""
    fields: Tensor
    """(B, D_tab) float32"""
    fields_valid: Tensor
    """(B,) bool"""
    pooled: Tensor | None = None
    """(B, encoder width) the text's average, where it was computed before; `tokens` is empty then"""

    @property
    def text_valid(self) -> Tensor:
        """(B,) bool"""
        return self.chunk_valid.any(dim=1)

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            moved[name] = None if value is None else value.to(device, non_blocking=True)
        return Batch(**moved)


class OneSide(nn.Module):
    """The text or the fields alone: ReLU, then a Linear, as design concat has them behind the pair."""

    def __init__(self, *, hidden: int, num_classes: int, side: str):
        super().__init__()
        self.side = side
        self.classifier = OutputLinear(hidden, num_classes)

    def forward(self, u: Tensor, v: Tensor, u_valid: Tensor, v_valid: Tensor) -> Tensor:
        """u (text) and v (fields) (B, H), masks (B,) → logits (B, K), or (B,) where K = 1."""
        own = zero_missing(u, u_valid) if self.side == "text" else zero_missing(v, v_valid)
        return self.classifier(F.relu(own)).squeeze(1)


def build_design(settings: TextTabularSettings, outputs: int) -> nn.Module:
    """The fusion that the settings name."""
    width: dict[str, Any] = {"hidden": settings.hidden, "num_classes": outputs}
    match settings.design:
        case "concat":
            return ConcatFusion(**width)
        case "gate":
            return GateFusion(**width, fused=settings.fused)
        case "moe":
            return MoEFusion(**width)
        case "cross_attention":
            return CrossAttentionFusion(**width, heads=settings.heads)
        case "text" | "tabular":
            return OneSide(**width, side=settings.design)
    raise AssertionError(f"design {settings.design} of text_tabular/config.py has no class here")


class TextTabular(nn.Module):
    """A text of chunks beside D_tab fields.

    The values of a missing side reach neither output nor gradient: a row without text is decided by its fields, a row
    without fields by its text.

    Args:
        encoder: gives last_hidden_state; None for design tabular.
        d_tab: columns of the fields.
        outputs: K.

    Raises:
        InputError: the heads of cross_attention do not divide the width.
    """

    def __init__(self, settings: TextTabularSettings, encoder: nn.Module | None, *, d_tab: int, outputs: int):
        super().__init__()
        self.pooling = settings.pooling
        self.encoder = encoder
        self.encoder_width = 1 if encoder is None else int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.text = nn.Linear(self.encoder_width, settings.hidden)
        self.tabular = TabularBranch(d_in=d_tab, hidden=settings.hidden)
        self.dropout = nn.Dropout(settings.dropout)
        self.design = build_design(settings, outputs)

    def encode_text(self, batch: Batch) -> Tensor:
        """(B, encoder width): the mean over the chunks that a row has; zero for a row without text."""
        if batch.pooled is not None:
            return batch.pooled
        rows, chunks = batch.chunk_valid.shape
        vectors = batch.fields.new_zeros(rows, chunks, self.encoder_width)
        if self.encoder is not None and len(batch.tokens):
            pooled = pool(self.encoder, batch.tokens, batch.token_valid, self.pooling)
            vectors = vectors.to(pooled.dtype).masked_scatter(batch.chunk_valid.unsqueeze(2), pooled)
        return average_chunks(vectors, batch.chunk_valid)

    def branches(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Text and fields, (B, H) each."""
        text = self.text(self.encode_text(batch))
        fields = self.tabular(batch.fields, batch.fields_valid)
        return self.dropout(text), self.dropout(fields)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, K), or a standardised number (B,) where K = 1."""
        text, fields = self.branches(batch)
        return self.design(text, fields, batch.text_valid, batch.fields_valid)
