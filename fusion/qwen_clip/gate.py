"""Two-embedding design `gate`: each channel chooses between text and other.

At D = 100 and 3 classes the projections and the gate have 40,500 parameters, the classifier 303.

Legend: B batch, D width of either embedding and of the fusion, C classes.
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
        hidden: width D of either embedding.
        num_classes: C; 1 is regression on log1p(price).
    """

    def __init__(self, *, hidden: int, num_classes: int = 1):
        super().__init__()
        self.project_u = nn.Linear(hidden, hidden)
        self.project_v = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(2 * hidden, hidden)
        self.gate_norm = nn.LayerNorm(hidden)
        self.classifier = OutputLinear(hidden, num_classes)

    def forward(
        self, u: Tensor, v: Tensor, u_valid: Tensor | None = None, v_valid: Tensor | None = None
    ) -> Tensor:
        """u (text) and v (other) (B, D), masks (B,) bool or None → logits (B, C), or (B,) where C = 1."""
        u = zero_missing(self.project_u(zero_missing(u, u_valid)), u_valid)
        v = zero_missing(self.project_v(zero_missing(v, v_valid)), v_valid)
        g = torch.sigmoid(self.gate_norm(self.gate(torch.cat([u, v], dim=1))))  # (B, D)
        if v_valid is not None:
            g = torch.where(v_valid.unsqueeze(1), g, 1.0)
        g = zero_missing(g, u_valid)
        fused = g * u + (1 - g) * v  # (B, D)
        return self.classifier(F.relu(fused)).squeeze(1)  # squeeze leaves C > 1 alone
