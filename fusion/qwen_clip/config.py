"""Settings of the two-embedding model: every default once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from contracts.errors import InputError
from contracts.workspace import CLIP_IMAGE, QWEN_TEXT
from fusion.config import QUICK_TRAINING, TINY_TRAINING, Package, TrainingSettings

MODALITIES = (CLIP_IMAGE, QWEN_TEXT)
"""The embeddings of the pair, in the order of the columns of the model's mask."""

Design = Literal["attention_moe", "plain", "concat", "gate", "moe", "cross_attention"]
"""Names of the ways in which two embeddings meet; fusion/qwen_clip/model.py has a class for each."""


@dataclass
class ModelConfig:
    """Settings of the model; their docstrings are the help texts of the command line."""

    design: Design = "attention_moe"
    """How the two embeddings meet; attention_moe and plain are the two published baselines."""
    hidden: int = 512
    """Width D that both embeddings are brought to."""
    heads: int = 8
    """Attention heads of attention_moe and cross_attention; must divide `hidden`."""
    experts: int = 3
    """Experts of attention_moe."""
    dropout: float = 0.25
    """Dropout in branches, experts and the plain MLP."""

    def __post_init__(self) -> None:
        if self.design not in get_args(Design):
            raise InputError(f"design {self.design!r} is not one of {', '.join(get_args(Design))}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout} must lie in [0, 1)")


@dataclass
class QwenClipSettings(ModelConfig, TrainingSettings):
    run: str = "fusion_qwen_clip"
    """Name of the run folder in checkpoints/, and of the prediction files."""

    def __post_init__(self) -> None:
        TrainingSettings.__post_init__(self)
        ModelConfig.__post_init__(self)


PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "quick": QUICK_TRAINING,
    "tiny": {"hidden": 64, "heads": 4, **TINY_TRAINING},
}

PACKAGE = Package(
    name="fusion.qwen_clip",
    settings=QwenClipSettings,
    presets=PRESETS,
    modalities=MODALITIES,
    model="fusion.qwen_clip.model:QwenClip",
)
