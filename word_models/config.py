"""Settings of the word models: every default once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from contracts.errors import InputError
from contracts.workspace import REPOSITORY

MIN_BINS = 3
"""A distribution over two bins could only say cheap or dear."""


@dataclass
class MlpSettings:
    """What training the sparse MLP needs, for prices as for explanations."""

    RENAMED: ClassVar[dict[str, str | None]] = {"epochs": None}
    workspace: str = str(REPOSITORY)
    """Folder with data/; results are written there."""
    seeds: int = 4
    """Number of models, fitted from different random seeds, whose predictions are averaged."""
    updates: int = 150
    """Least number of optimizer steps of the MLP. Six passes over a few thousand rows take more; fewer rows are passed
    over more often."""
    hidden: int = 128
    """Width of the MLP's first layer; the later layers have half of it."""
    lr: float = 1e-3
    """Learning rate of the MLP."""
    word_dropout: float = 0.3
    """Fraction of a text's terms that the MLP does not see at a training step."""
    seed: int = 0
    """The first of the random seeds."""

    def __post_init__(self) -> None:
        _require_positive(self, "seeds", "updates", "hidden", "lr")
        if not 0 <= self.word_dropout < 1:
            raise InputError(f"--word-dropout {self.word_dropout}: must be at least 0 and below 1")


@dataclass
class WordModelSettings(MlpSettings):
    model: Literal[
        "ridge", "kernel", "boosted", "lightgbm", "neighbours", "mlp", "mlp_on_kernel", "mlp_distribution"
    ] = "mlp"
    """ridge: ridge regression on TF-IDF. kernel: kernel ridge regression with a learned similarity of words,
    meanings and amounts. boosted: the kernel, then LightGBM on its errors. lightgbm: LightGBM on an SVD of the terms.
    neighbours: the prices of similar products. mlp: a sparse multilayer perceptron with SMAPE as its loss.
    mlp_on_kernel: the mlp with the kernel's price and the prices of similar products as further inputs.
    mlp_distribution: the mlp over bins of log price, from which the price with the lowest expected SMAPE is read."""
    embeddings: tuple[str, ...] = ()
    """Embedding files to use beside the word counts, such as qwen_text. They must be out of fold or come from a frozen
    encoder."""
    predictions: str = ""
    """Name of the prediction files and of the folder under checkpoints/; empty means words_<model>_<embeddings>."""
    kernel_steps: int = 40
    """Optimizer steps in which the kernel learns its similarity."""
    keep_kernels: bool = False
    """Keep each fitted kernel under checkpoints/kernels/, so that another model on the same rows need not fit it again;
    kernel, boosted and mlp_on_kernel begin with the same one."""
    trees: int = 500
    """Boosting rounds of LightGBM."""
    svd: int = 128
    """Dimensions of the SVD of the terms that --model lightgbm sees."""
    bins: int = 40
    """Bins of log price in --model mlp_distribution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "kernel_steps", "trees", "svd")
        if self.predictions != Path(self.predictions).name:
            raise InputError(f"--predictions {self.predictions}: must be a plain name, without a folder")
        if self.bins < MIN_BINS:
            raise InputError(f"--bins {self.bins}: a distribution needs at least {MIN_BINS}")
        for name in self.embeddings:
            if self.embeddings.count(name) > 1:
                raise InputError(f"--embeddings {name}: named twice; name each file once")

    @property
    def prediction_name(self) -> str:
        return self.predictions or "_".join(["words", self.model, *self.embeddings])


def _require_positive(settings: MlpSettings, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value <= 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be above 0")
