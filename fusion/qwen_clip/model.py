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
from contracts.workspace import CLIP_IMAGE, QWEN_TEXT
from fusion.blocks import (
    AttentionBlock,
    EmbeddingBranch,
    FusionOutput,
    MixtureOfExperts,
    OutputLinear,
    PriceModel,
)
from fusion.qwen_clip.concat import ConcatFusion
from fusion.qwen_clip.config import MODALITIES, ModelConfig
from fusion.qwen_clip.cross_attention import CrossAttentionFusion
from fusion.qwen_clip.gate import GateFusion
from fusion.qwen_clip.moe import MoEFusion


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
            nn.Linear(2 * hidden, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2),
            nn.GELU(),
            nn.Dropout(dropout),
        )
        self.classifier = OutputLinear(hidden // 2, 1)

    def forward(self, u: Tensor, v: Tensor, u_valid: Tensor, v_valid: Tensor) -> Tensor:
        """u (text) and v (image) (B, D), zero where missing → log1p(price) (B,)."""
        return self.classifier(self.mlp(torch.cat([u, v], dim=1))).squeeze(1)


def build_design(config: ModelConfig) -> nn.Module:
    """The fusion of two (B, D) embeddings that the config names, for regression."""
    width = config.hidden
    match config.design:
        case "attention_moe":
            return AttentionMoEFusion(
                hidden=width, heads=config.heads, experts=config.experts, dropout=config.dropout
            )
        case "plain":
            return PlainFusion(hidden=width, dropout=config.dropout)
        case "concat":
            return ConcatFusion(hidden=width)
        case "gate":
            return GateFusion(hidden=width)
        case "moe":
            return MoEFusion(hidden=width)
        case "cross_attention":
            return CrossAttentionFusion(hidden=width, heads=config.heads)
    raise AssertionError(f"design {config.design} of fusion/qwen_clip/config.py has no class here")


class QwenClip(PriceModel):
    """log1p(price) from Qwen text and CLIP image: two branches and a design.

    The values of a missing modality, NaN included, reach neither output nor gradient.

    Args:
        config: see ModelConfig.
        widths: D_in of each of MODALITIES, as read from the embedding files.

    Raises:
        InputError: `heads` does not divide `hidden`, or a modality has no width.
    """

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__()
        if set(widths) != set(MODALITIES):
            raise InputError(f"widths are given for {sorted(widths)}, needed for {sorted(MODALITIES)}")
        self.text = EmbeddingBranch(d_in=widths[QWEN_TEXT], d_out=config.hidden, dropout=config.dropout)
        self.image = EmbeddingBranch(d_in=widths[CLIP_IMAGE], d_out=config.hidden, dropout=config.dropout)
        self.fusion = build_design(config)

    def set_output_bias(self, value: float) -> None:
        if isinstance(self.fusion, AttentionMoEFusion):
            self.fusion.experts.set_output_bias(value)
        else:
            nn.init.constant_(self.get_parameter("fusion.classifier.bias"), value)

    def forward(self, embeddings: dict[str, Tensor], valid: Tensor) -> FusionOutput:
        """embeddings: (B, D_in) of each of MODALITIES; valid: (B, 2) bool in the order of MODALITIES."""
        assert valid.shape[1] == len(MODALITIES), f"valid has shape {tuple(valid.shape)}, not (B, 2)"
        image_valid, text_valid = valid.unbind(dim=1)
        text = self.text(embeddings[QWEN_TEXT], text_valid)  # (B, D)
        image = self.image(embeddings[CLIP_IMAGE], image_valid)  # (B, D)
        output = self.fusion(text, image, text_valid, image_valid)
        return FusionOutput(*output) if isinstance(output, tuple) else FusionOutput(output)
