"""A long text as the average over its chunks, so that it can be one embedding of a pair.

Legend: B batch, D width.
"""

from __future__ import annotations

from torch import Tensor

from fusion.blocks import zero_missing


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
