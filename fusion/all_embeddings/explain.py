"""Which embeddings move the prices of a finished run: over its validation rows, and product by product.

python -m fusion.all_embeddings.explain --workspace OUT --products 3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import InputError, run_entry_point
from fusion.all_embeddings.config import PACKAGE
from fusion.config import EvaluateSettings
from training.settings import parse_settings

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class ExplainSettings(EvaluateSettings):
    ids: tuple[str, ...] = ()
    """sample_ids of validation rows to plot; empty means `products` of them, from cheap to dear."""
    products: int = 3
    """Number of products to plot if no ids are given."""
    repeats: int = 5
    """Number of permutations over which the SMAPE increase is averaged."""
    seed: int = 0
    """Seeds the permutations."""

    def __post_init__(self) -> None:
        for name, least in (("products", 0), ("repeats", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least {least}")


def main(argv: list[str] | None = None) -> pd.DataFrame:
    settings = parse_settings(ExplainSettings, argv, description=__doc__.split("\n")[0])
    from fusion.explanation import explain
    from fusion.finished import load_trained

    return explain(
        load_trained(PACKAGE, settings),
        ids=settings.ids,
        products=settings.products,
        repeats=settings.repeats,
        seed=settings.seed,
    )


if __name__ == "__main__":
    run_entry_point(main)
