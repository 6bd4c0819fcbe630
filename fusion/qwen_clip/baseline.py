"""The qwen_clip model: a branch to D = 512 for Qwen text and for CLIP image, then any two-embedding fusion.

Parameters at D_in 1027 (text) and 768 (image), D = 512, one output:

    two branches (text 527,361, image 394,753)                                      922,114
    attention_moe  two attention blocks 2,103,296
                   3 experts 1024→1024→384→256→1 4,626,051, gate 3,075            6,732,422   in all 7,654,536
    plain          MLP 1024→512→256→1                                               656,385   in all 1,578,499

These are the two baselines, "about 7.7 M" and "about 1.6 M"; the inner widths are our choice. As each
attention block sees one key, 1,050,624 parameters of attention_moe never receive a gradient.

Legend: B batch, D fused width, D_in encoder width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contracts.errors import InputError
from fusion.blocks import AttentionBlock, EmbeddingBranch, FusionOutput, MixtureOfExperts
from fusion.qwen_clip.concat import ConcatFusion
from fusion.qwen_clip.cross_attention import CrossAttentionFusion
from fusion.qwen_clip.gate import GateFusion
from fusion.qwen_clip.moe import MoEFusion

MODALITIES = ("clip_image", "qwen_text")
"""The order of the columns of `valid`."""


class AttentionMoEFusion(nn.Module):
    """Text attends to image, image to text, a mixture of experts on both: log1p(price) and its gate.

    Args:
        hidden: width D of either embedding; the experts' layers are 2D, 3D/4, D/2.
        heads: attention heads; must divide `hidden`.
    """

    def __init__(self, *, hidden: int, heads: int = 8, experts: int = 3, dropout: float = 0.25):
        super().__init__()
        self.text_from_image = AttentionBlock(width=hidden, heads=heads)
        self.image_from_text = AttentionBlock(width=hidden, heads=heads)
        self.experts = MixtureOfExperts(
            d_in=2 * hidden,
            hidden=(2 * hidden, 3 * hidden // 4, hidden // 2),
            experts=experts,
            dropout=dropout,
        )

    def forward(self, u: Tensor, v: Tensor, u_valid: Tensor, v_valid: Tensor) -> tuple[Tensor, Tensor]:
        """u (text) and v (image) (B, D), masks (B,) → log1p(price) (B,), gate (B, E)."""
        text = self.text_from_image(u, v, v_valid)
        image = self.image_from_text(v, u, u_valid)
        output, gate = self.experts(torch.cat([text, image], dim=1))
        return output.squeeze(1), gate


class PlainFusion(nn.Module):
    """MLP 2D → D → D/2 → 1 on the two branches side by side."""

    def __init__(self, *, hidden: int, dropout: float = 0.25):
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Dropout(dropout)),
            *(nn.Linear(hidden, hidden // 2), nn.GELU(), nn.Dropout(dropout)),
        )
        self.classifier = nn.Linear(hidden // 2, 1)

    def forward(self, u: Tensor, v: Tensor, u_valid: Tensor, v_valid: Tensor) -> Tensor:
        return self.classifier(self.mlp(torch.cat([u, v], dim=1))).squeeze(1)


DESIGNS = ("attention_moe", "plain", "concat", "gate", "moe", "cross_attention")


def build_design(design: str, *, hidden: int, heads: int, experts: int, dropout: float) -> nn.Module:
    """The fusion of two (B, D) embeddings called `design`, for regression."""
    match design:
        case "attention_moe":
            return AttentionMoEFusion(hidden=hidden, heads=heads, experts=experts, dropout=dropout)
        case "plain":
            return PlainFusion(hidden=hidden, dropout=dropout)
        case "concat":
            return ConcatFusion(hidden=hidden)
        case "gate":
            return GateFusion(hidden=hidden)
        case "moe":
            return MoEFusion(hidden=hidden)
        case "cross_attention":
            return CrossAttentionFusion(hidden=hidden, heads=heads)
    raise InputError(f"no design {design!r}: choose one of {', '.join(DESIGNS)}")


class QwenClip(nn.Module):
    """log1p(price) from Qwen text and CLIP image: two branches and a design.

    A missing modality's values, NaN included, reach neither output nor gradient.

    Args:
        widths: D_in of each of MODALITIES, as read from the embedding files.
        design: one of DESIGNS.
        hidden: fused width D.
        heads: for the designs with attention; must divide `hidden`.
        experts: E of attention_moe.
        dropout: in branches, experts and the plain MLP.

    Raises:
        InputError: no such design, `heads` does not divide `hidden`, or a modality without a width.
    """

    def __init__(
        self,
        widths: dict[str, int],
        *,
        design: str = "attention_moe",
        hidden: int = 512,
        heads: int = 8,
        experts: int = 3,
        dropout: float = 0.25,
    ):
        super().__init__()
        if set(widths) != set(MODALITIES):
            raise InputError(f"widths are given for {sorted(widths)}, needed for {sorted(MODALITIES)}")
        self.text = EmbeddingBranch(d_in=widths["qwen_text"], d_out=hidden, dropout=dropout)
        self.image = EmbeddingBranch(d_in=widths["clip_image"], d_out=hidden, dropout=dropout)
        self.fusion = build_design(design, hidden=hidden, heads=heads, experts=experts, dropout=dropout)

    def set_output_bias(self, mean_log_price: float) -> None:
        """Start the predictions near the mean log1p(price) of the training rows instead of near $0."""
        if isinstance(self.fusion, AttentionMoEFusion):
            self.fusion.experts.set_output_bias(mean_log_price)
        else:
            nn.init.constant_(self.fusion.classifier.bias, mean_log_price)

    def forward(self, embeddings: dict[str, Tensor], valid: Tensor) -> FusionOutput:
        """embeddings: (B, D_in) of each of MODALITIES; valid: (B, 2) bool in the order of MODALITIES."""
        assert valid.shape[1] == len(MODALITIES), f"valid has shape {tuple(valid.shape)}, not (B, 2)"
        image_valid, text_valid = valid.unbind(dim=1)
        text = self.text(embeddings["qwen_text"], text_valid)  # (B, D)
        image = self.image(embeddings["clip_image"], image_valid)  # (B, D)
        output = self.fusion(text, image, text_valid, image_valid)
        return FusionOutput(*output) if isinstance(output, tuple) else FusionOutput(output)
