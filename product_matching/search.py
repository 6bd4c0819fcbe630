"""Find the products of an indexed catalogue that match a title.

python -m product_matching.search "sony dsc-w120 7.2mp camera" --index index
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from contracts.errors import InputError, run_entry_point
from product_matching.catalogue import product_text
from product_matching.config import SearchSettings
from product_matching.encoder import encode, load_encoder
from product_matching.evaluate import Calibration
from product_matching.index import CatalogueIndex
from training.settings import parse_settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Match:
    """One record found. Probability and confidence are None for an index without a calibration."""

    id: str
    title: str
    brand: str
    model: str
    category: str
    price: str
    cosine: float
    probability: float | None
    """that this record is the same product, by the calibration on the validation pairs"""
    confidence: str | None
    """high (probability above 0.85), medium (above 0.75) or low"""


@dataclass
class Matcher:
    """An index with the encoder that made it."""

    index: CatalogueIndex
    encoder: SentenceTransformer

    @classmethod
    def load(cls, folder: Path | str, model: str = "", device: str = "auto") -> Matcher:
        """Raises InputError for a damaged index, or a model whose embeddings are not the indexed ones."""
        index = CatalogueIndex.load(folder)
        name = model or index.meta["model"]
        encoder = load_encoder(name, max_length=index.meta["max_length"], device=device)
        index.require_encoder(encoder, name)
        return cls(index, encoder)

    def match(self, titles: list[str], k: int = 5, category: str | None = None) -> list[list[Match]]:
        """For each title at most `k` records, the most similar first; fewer where there are no more."""
        if category is not None and category.lower() not in self.index.rows_of_category:
            raise InputError(f"category {category[:80]!r} is not in this catalogue")
        texts = product_text(pd.DataFrame({"title": titles, "brand": "", "model": ""}))
        cosines, rows = self.index.search(encode(self.encoder, texts), k, category=category)
        calibration = self.index.meta.get("calibration")
        calibration = Calibration(**calibration) if calibration else None
        return [
            [self._match(row, cosine, calibration) for row, cosine in zip(*found, strict=True) if row >= 0]
            for found in zip(rows.tolist(), cosines.tolist(), strict=True)
        ]

    def _match(self, row: int, cosine: float, calibration: Calibration | None) -> Match:
        record = self.index.catalogue.iloc[row]
        probability = float(calibration.probability(cosine)) if calibration else None
        band = calibration.band(probability) if calibration else None
        fields = (record[name] for name in ("id", "title", "brand", "model", "category", "price"))
        return Match(*fields, cosine, probability, band)


def main(argv: Sequence[str] | None = None) -> list[Match]:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # the title is the only argument without a flag in front; argparse would also take it from between flags
    title = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    settings = parse_settings(
        SearchSettings, arguments, description='Match a title: product_matching.search "title" [flags]'
    )
    if not title.strip():
        raise InputError('give the title first: python -m product_matching.search "title" --index index')
    found = Matcher.load(settings.index, settings.model, settings.device).match(
        [title], settings.k, settings.category or None
    )[0]
    for match in found:
        probability = (
            "" if match.probability is None else f"  p {match.probability:.2f} {match.confidence:6s}"
        )
        print(f"{match.cosine:.3f}{probability}  {match.id}  {match.title}")
    return found


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
