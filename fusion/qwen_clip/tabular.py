"""The other origins of a pair: a branch for tabular fields, and the average over a long text's chunks.

Legend: B batch, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fusion.blocks import zero_missing


class TabularBranch(nn.Module):
    """LayerNorm → Linear → ReLU: 1,222 parameters for 11 fields at D = 100.

    Args:
        d_in: number of fields.
        hidden: width D of the output.
    """

    def __init__(self, *, d_in: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_in)
        self.linear = nn.Linear(d_in, hidden)

    def forward(self, fields: Tensor, valid: Tensor | None = None) -> Tensor:
        """fields (B, d_in), valid (B,) bool or None → (B, D), zero for a row without fields."""
        return zero_missing(F.relu(self.linear(self.norm(zero_missing(fields, valid)))), valid)


def average_chunks(chunks: Tensor, chunk_valid: Tensor) -> Tensor:
    """Mean over the chunks that exist; what padding holds, NaN included, has no effect.

    Args:
        chunks: (B, chunks, D) pooled embeddings of a text's chunks.
        chunk_valid: (B, chunks) bool.

    Returns:
        (B, D); zero for a row without any chunk.
    """
    count = chunk_valid.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    return zero_missing(chunks, chunk_valid).sum(dim=1) / count
