"""Settings of the two-embedding model: every default once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusion.config import TrainingSettings

Design = Literal["attention_moe", "plain", "concat", "gate", "moe", "cross_attention"]


@dataclass
class QwenClipSettings(TrainingSettings):
    run: str = "fusion_qwen_clip"
    """Name of the run folder under checkpoints/."""
    design: Design = "attention_moe"
    """How the two embeddings meet; attention_moe and plain are the published baselines, the others the four designs."""
    hidden: int = 512
    """Width D that both embeddings are brought to."""
    heads: int = 8
    """Attention heads; must divide `hidden`."""
    experts: int = 3
    """Experts of attention_moe."""
    dropout: float = 0.25
    """In branches, experts and the plain MLP."""


PRESETS = {
    "base": {},
    "tiny": {"hidden": 64, "heads": 4, "epochs": 150, "patience": 20, "lr": 2e-3, "lr_patience": 5},
}


def build_model(settings: QwenClipSettings, widths: dict[str, int]):
    from fusion.qwen_clip.baseline import QwenClip

    return QwenClip(
        widths,
        design=settings.design,
        hidden=settings.hidden,
        heads=settings.heads,
        experts=settings.experts,
        dropout=settings.dropout,
    )
