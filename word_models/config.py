"""Settings of this stage: every default once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from contracts.errors import InputError
from contracts.workspace import REPOSITORY


@dataclass
class WordModelSettings:
    workspace: str = str(REPOSITORY)
    """Folder with data/; predictions/ is written there."""
    model: Literal[
        "ridge", "kernel", "boosted", "lightgbm", "neighbours", "mlp", "mlp_on_kernel", "mlp_distribution"
    ] = "mlp"
    """ridge on TF-IDF; kernel: ridge in a learned similarity of words, meanings and amounts; boosted: kernel, then
    LightGBM on its errors; lightgbm on an SVD; neighbours: prices of similar products; mlp: sparse MLP with a SMAPE
    loss; mlp_on_kernel: the same with the kernel's price and the prices around it as columns; mlp_distribution: the
    mlp over bins of log price, from which the price with the lowest expected SMAPE is read."""
    embeddings: tuple[str, ...] = ()
    """Embedding files to use beside the word counts, such as qwen_text; out of fold, or of a frozen encoder."""
    name: str = ""
    """Name of the prediction files; empty means words_<model>, and the embeddings."""
    seeds: int = 4
    """Networks (or forests) that are averaged."""
    epochs: int = 6
    """Passes of the MLP; the batch doubles after each of the first three."""
    hidden: int = 128
    """Width of the MLP's first layer; the others have half of it."""
    lr: float = 1e-3
    """Learning rate of the MLP."""
    word_dropout: float = 0.3
    """Share of a text's terms hidden in training."""
    bins: int = 40
    """Bins of the price distribution."""
    kernel_steps: int = 40
    """Steps in which the kernel's similarity is learned."""
    trees: int = 500
    """Boosting rounds of LightGBM."""
    svd: int = 128
    """Dimensions of the SVD that LightGBM sees."""
    seed: int = 0
    """First of the seeds."""

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "hidden", "lr", "kernel_steps", "svd", "trees"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")
        if self.bins < 3:
            raise InputError(f"--bins {self.bins}: a distribution needs at least 3")
        if not 0 <= self.word_dropout < 1:
            raise InputError(f"--word-dropout {self.word_dropout}: must lie in [0, 1)")
