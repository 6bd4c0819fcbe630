"""Two-embedding design `moe`: a router gives each row one share for text and one for other.

At D = 100 and 3 classes the router has 402 parameters, the classifier 303.

Legend: B batch, D width of either embedding, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.blocks import OutputLinear, zero_missing


class MoEFusion(nn.Module):
    """p = softmax(Linear([u; v])), then p0·u + p1·v → ReLU → Linear: the embeddings are the experts.

    A missing embedding gets no share; with both missing the sum is zero either way.

    Args:
        hidden: width D of either embedding.
        num_classes: C; 1 is regression on log1p(price).
    """

    def __init__(self, *, hidden: int, num_classes: int = 1):
        super().__init__()
        self.router = nn.Linear(2 * hidden, 2)
        self.classifier = OutputLinear(hidden, num_classes)

    def route(
        self, u: Tensor, v: Tensor, u_valid: Tensor | None = None, v_valid: Tensor | None = None
    ) -> Tensor:
        """Shares (B, 2) of u and v, each row summing to 1; missing rows of u and v must be zero already."""
        logits = self.router(torch.cat([u, v], dim=1))  # (B, 2)
        # The lowest float instead of -inf: with both missing, -inf would be a softmax over nothing, NaN.
        lowest = torch.finfo(logits.dtype).min
        logit_u = logits[:, 0] if u_valid is None else torch.where(u_valid, logits[:, 0], lowest)
        logit_v = logits[:, 1] if v_valid is None else torch.where(v_valid, logits[:, 1], lowest)
        return torch.stack([logit_u, logit_v], dim=1).softmax(dim=1)

    def forward(
        self, u: Tensor, v: Tensor, u_valid: Tensor | None = None, v_valid: Tensor | None = None
    ) -> Tensor:
        """u (text) and v (other) (B, D), masks (B,) bool or None → logits (B, C), or (B,) where C = 1."""
        u = zero_missing(u, u_valid)
        v = zero_missing(v, v_valid)
        share_u, share_v = self.route(u, v, u_valid, v_valid).split(1, dim=1)  # (B, 1) each
        fused = share_u * u + share_v * v  # (B, D)
        return self.classifier(F.relu(fused)).squeeze(1)  # squeeze leaves C > 1 alone
