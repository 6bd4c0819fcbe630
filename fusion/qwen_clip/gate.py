"""Two-embedding design `gate`: each channel chooses between text and other.

At H = F = 100 and 3 classes the projections and the gate have 40,500 parameters, the classifier 303.

Legend: B batch, H width of either embedding, F width of the fusion, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.blocks import OutputLinear, zero_missing


class GateFusion(nn.Module):
    """g = σ(LayerNorm(W[u; v])), then g⊙u + (1−g)⊙v → ReLU → Linear, with u and v projected first.

    A missing embedding gets no share: the gate goes to the other one.

    Args:
        hidden: width H of either embedding.
        num_classes: C; 1 is regression on log1p(price).
        fused: width F that both are projected to; None means H.
    """

    def __init__(self, *, hidden: int, num_classes: int = 1, fused: int | None = None):
        super().__init__()
        fused = fused or hidden
        self.project_u = nn.Linear(hidden, fused)
        self.project_v = nn.Linear(hidden, fused)
        self.gate = nn.Linear(2 * fused, fused)
        self.gate_norm = nn.LayerNorm(fused)
        self.classifier = OutputLinear(fused, num_classes)

    def weigh(self, u: Tensor, v: Tensor, u_valid: Tensor | None, v_valid: Tensor | None) -> Tensor:
        """The share (B, F) of u in each channel; u and v (B, F) are projected, and zero where missing."""
        g = torch.sigmoid(self.gate_norm(self.gate(torch.cat([u, v], dim=1))))  # (B, F)
        if v_valid is not None:
            g = torch.where(v_valid.unsqueeze(1), g, 1.0)
        return zero_missing(g, u_valid)

    def project(
        self, u: Tensor, v: Tensor, u_valid: Tensor | None, v_valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, H) each to (B, F) each, zero where missing."""
        u = zero_missing(self.project_u(zero_missing(u, u_valid)), u_valid)
        v = zero_missing(self.project_v(zero_missing(v, v_valid)), v_valid)
        return u, v

    def forward(
        self, u: Tensor, v: Tensor, u_valid: Tensor | None = None, v_valid: Tensor | None = None
    ) -> Tensor:
        """u (text) and v (other) (B, H), masks (B,) bool or None → logits (B, C), or (B,) where C = 1."""
        u, v = self.project(u, v, u_valid, v_valid)
        g = self.weigh(u, v, u_valid, v_valid)
        fused = g * u + (1 - g) * v  # (B, F)
        return self.classifier(F.relu(fused)).squeeze(1)  # squeeze leaves C > 1 alone
