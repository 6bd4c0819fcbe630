"""Which embeddings move the prices of a finished run: over its validation rows, and product by product.

python -m fusion.all_embeddings.explain --workspace OUT --products 3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import InputError, run_entry_point
from contracts.workspace import REPOSITORY, Workspace
from fusion.all_embeddings.config import AllEmbeddingsSettings, build_model
from training.settings import parse_settings

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class ExplainSettings:
    workspace: str = str(REPOSITORY)
    """Folder with data/ and checkpoints/."""
    run: str = AllEmbeddingsSettings.run
    """Name of the finished run."""
    ids: tuple[str, ...] = ()
    """sample_ids of validation rows to plot; empty means `products` of them, from cheap to dear."""
    products: int = 3
    """Products to plot where no ids are given."""
    repeats: int = 5
    """Permutations whose SMAPE increase is averaged."""
    seed: int = 0
    """Seeds the permutations."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def __post_init__(self) -> None:
        for name, least in (("products", 0), ("repeats", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least {least}")


def main(argv: list[str] | None = None) -> pd.DataFrame:
    settings = parse_settings(ExplainSettings, argv, description=__doc__.split("\n")[0])
    from fusion.all_embeddings.model import MODALITIES
    from fusion.experiment import load_trained
    from fusion.explanation import explain

    workspace = Workspace(settings.workspace)
    trained = load_trained(
        workspace, settings.run, "fusion.all_embeddings", AllEmbeddingsSettings, build_model, settings.device
    )
    return explain(
        trained, workspace, MODALITIES, ids=settings.ids, products=settings.products,
        repeats=settings.repeats, seed=settings.seed,
    )  # fmt: skip


if __name__ == "__main__":
    run_entry_point(main)
