"""Settings of the four-embedding model: every default once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from contracts.errors import InputError
from contracts.workspace import EMBEDDINGS
from fusion.config import TINY_TRAINING, Package, TrainingSettings

MODALITIES = EMBEDDINGS
"""The embeddings that the model reads, in the order of the columns of its mask."""

Variant = Literal["hierarchical", "concat", "flat", "tokens"]
"""Names of the model's forms; fusion/all_embeddings/model.py has a class for each."""


@dataclass
class ModelConfig:
    """Settings of the model; their docstrings are the help texts of the command line."""

    variant: Variant = "hierarchical"
    """hierarchical: three cross-attentions; concat: attention over concatenations; tokens: hierarchical with
    several tokens per embedding; flat: one MLP on the concatenated embeddings."""
    width: int = 512
    """Fused width D. The layers of the experts follow from it: 2D, D, D/2."""
    heads: int = 8
    """Attention heads H; must divide the width."""
    experts: int = 3
    """Experts E of the mixture; 1 is a plain MLP behind the fusion."""
    dropout: float = 0.25
    """Dropout in branches and experts."""
    branch_depth: int = 1
    """Layers per branch. 2 (D_in → branch_hidden → D) is a known failure, kept as an ablation."""
    branch_hidden: int = 768
    """Middle width of a branch of two layers."""
    tokens_per_embedding: int = 4
    """Tokens T per embedding in variant tokens; must divide the width."""
    short_path: bool = True
    """Skip the query and key projections where there is one key. The result is the same, with less work."""
    auxiliary_under_15: bool = False
    """Also predict whether the product costs under $15."""
    structural_branch: bool = False
    """Give the three structural fields at the end of qwen_text a branch of their own."""

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise InputError(f"variant {self.variant!r} is not one of {', '.join(get_args(Variant))}")
        if self.width < 2 or self.width % 2:
            raise InputError(f"width={self.width} must be even: the experts' last layer is half of it")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout} must lie in [0, 1)")
        tokens = self.tokens_per_embedding
        if self.variant == "tokens" and (tokens < 1 or self.width % tokens):
            raise InputError(f"tokens_per_embedding={tokens} does not divide width={self.width}")
        if self.variant == "flat" and (self.structural_branch or self.branch_depth != 1):
            raise InputError("variant flat has no branches: leave structural_branch and branch_depth alone")


@dataclass
class AllEmbeddingsSettings(ModelConfig, TrainingSettings):
    run: str = "fusion_all_embeddings"
    """Name of the run folder in checkpoints/, and of the prediction files."""

    def __post_init__(self) -> None:
        TrainingSettings.__post_init__(self)
        ModelConfig.__post_init__(self)


PRESETS = {
    "base": {},
    "tiny": {"width": 64, "heads": 4, **TINY_TRAINING},
}

PACKAGE = Package(
    name="fusion.all_embeddings",
    settings=AllEmbeddingsSettings,
    presets=PRESETS,
    modalities=MODALITIES,
    model="fusion.all_embeddings.model:AllEmbeddings",
)
