"""Two-embedding design `concat`: ReLU([u; v]) → Linear. 603 parameters at D = 100 and 3 classes.

Legend: B batch, D width of either embedding, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.blocks import OutputLinear, zero_missing


class ConcatFusion(nn.Module):
    """The simplest pairing: the classifier sees both embeddings side by side.

    Args:
        hidden: width D of either embedding.
        num_classes: C; 1 is regression on log1p(price).
    """

    def __init__(self, *, hidden: int, num_classes: int = 1):
        super().__init__()
        self.classifier = OutputLinear(2 * hidden, num_classes)

    def forward(
        self, u: Tensor, v: Tensor, u_valid: Tensor | None = None, v_valid: Tensor | None = None
    ) -> Tensor:
        """u (text) and v (other) (B, D), masks (B,) bool or None → logits (B, C), or (B,) where C = 1."""
        pair = torch.cat([zero_missing(u, u_valid), zero_missing(v, v_valid)], dim=1)  # (B, 2D)
        return self.classifier(F.relu(pair)).squeeze(1)  # squeeze leaves C > 1 alone
