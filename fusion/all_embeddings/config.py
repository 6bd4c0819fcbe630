"""Settings of the four-embedding model: every default once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from contracts.errors import InputError
from contracts.workspace import EMBEDDINGS
from fusion.config import QUICK_TRAINING, TINY_TRAINING, Package, TrainingSettings

MODALITIES = EMBEDDINGS
"""The embeddings that the model reads, in the order of the columns of its mask."""

Variant = Literal["hierarchical", "concat", "flat", "tokens", "branch_mixture", "branch_weights"]
"""Names of the model's forms; fusion/all_embeddings/model.py has a class for each."""


@dataclass
class ModelConfig:
    """Settings of the model; their docstrings are the help texts of the command line."""

    variant: Variant = "hierarchical"
    """hierarchical: three cross-attentions; concat: attention over concatenations; tokens: hierarchical with
    several tokens per embedding; flat: one MLP on the concatenated embeddings; branch_mixture: a sum of the
    branches that a gate weighs for each product; branch_weights: the same with one learned weight per embedding."""
    width: int = 512
    """Fused width D. The layers of the experts follow from it: 2D, D, D/2."""
    branch_widths: tuple[str, ...] = ()
    """Widths of single branches, such as clip_image=256. The other branches have the width that the variant needs;
    where embeddings must be equally wide, one Linear brings such a branch to that width."""
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
        names_a_branch = self.structural_branch or self.branch_depth != 1 or self.branch_widths
        if self.variant == "flat" and names_a_branch:
            raise InputError(
                "variant flat has no branches: leave structural_branch, branch_depth and branch_widths alone"
            )
        self.width_of_branch()

    def width_of_branch(self) -> dict[str, int]:
        """Embedding to width, for the embeddings that `branch_widths` names.

        Raises InputError for an entry that is not an embedding, an equals sign and a width above 0.
        """
        widths: dict[str, int] = {}
        for entry in self.branch_widths:
            name, _, width = entry.partition("=")
            if name not in MODALITIES or not width.isdecimal() or int(width) == 0:
                raise InputError(
                    f"branch_widths {entry}: write an embedding and a width, such as {MODALITIES[0]}=256; "
                    f"the embeddings are {', '.join(MODALITIES)}"
                )
            if name in widths:
                raise InputError(f"branch_widths {entry}: {name} already has the width {widths[name]}")
            widths[name] = int(width)
        return widths


@dataclass
class AllEmbeddingsSettings(ModelConfig, TrainingSettings):
    run: str = "fusion_all_embeddings"
    """Name of the run folder in checkpoints/, and of the prediction files."""

    def __post_init__(self) -> None:
        TrainingSettings.__post_init__(self)
        ModelConfig.__post_init__(self)


PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "quick": QUICK_TRAINING,
    "tiny": {"width": 64, "heads": 4, **TINY_TRAINING},
}

PACKAGE = Package(
    name="fusion.all_embeddings",
    settings=AllEmbeddingsSettings,
    presets=PRESETS,
    modalities=MODALITIES,
    model="fusion.all_embeddings.model:AllEmbeddings",
    reads_features=True,
)
