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
from product_matching.calibration import Calibration, confidence_band
from product_matching.catalogue import product_text
from product_matching.config import SearchSettings
from product_matching.encoder import encode, load_encoder
from product_matching.index import CatalogueIndex
from training.settings import parse_settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Match:
    """One record that was found. Probability and confidence are None for an index without a calibration."""

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
        """Raises InputError for a damaged index, or a model that did not make the indexed embeddings.

        Args:
            model: hub id or local folder; empty: the one that the index names.
        """
        index = CatalogueIndex.load(folder)
        name = model or index.meta["model"]
        encoder = load_encoder(name, max_length=index.meta["max_length"], device=device)
        index.require_encoder(encoder, name)
        return cls(index, encoder)

    def match(self, titles: list[str], k: int = 5, category: str | None = None) -> list[list[Match]]:
        """For each title at most `k` records, the most similar first; fewer if the index finds fewer."""
        if category is not None:
            self.index.require_category(category)  # before the titles are encoded, which takes longer
        # a title alone: the encoder reads it as it reads a record without brand and model number
        texts = product_text(pd.DataFrame({"title": titles, "brand": "", "model": ""}))
        cosines, rows = self.index.search(encode(self.encoder, texts), k, category=category)
        stored = self.index.meta.get("calibration")
        calibration = Calibration(**stored) if stored else None
        results = []
        for cosines_of_title, rows_of_title in zip(cosines.tolist(), rows.tolist(), strict=True):
            found = zip(rows_of_title, cosines_of_title, strict=True)
            results.append([self._match(row, cosine, calibration) for row, cosine in found if row >= 0])
        return results

    def _match(self, row: int, cosine: float, calibration: Calibration | None) -> Match:
        record = self.index.catalogue.iloc[row]
        probability = float(calibration.probability(cosine)) if calibration else None
        return Match(
            id=record["id"],
            title=record["title"],
            brand=record["brand"],
            model=record["model"],
            category=record["category"],
            price=record["price"],
            cosine=cosine,
            probability=probability,
            confidence=None if probability is None else confidence_band(probability),
        )


def main(argv: Sequence[str] | None = None) -> list[Match]:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # the title is taken off here, since argparse would also accept it between two flags
    title = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    settings = parse_settings(
        SearchSettings, arguments, description='Match a title: product_matching.search "title" [flags]'
    )
    if not title.strip():
        raise InputError('give the title first: python -m product_matching.search "title" --index index')
    matcher = Matcher.load(settings.index, settings.model, settings.device)
    matches = matcher.match([title], settings.k, settings.category or None)[0]
    for match in matches:
        confidence = ""
        if match.probability is not None:
            confidence = f"  p {match.probability:.2f} {match.confidence:6s}"
        print(f"{match.cosine:.3f}{confidence}  {match.id}  {match.title}")
    return matches


if __name__ == "__main__":
    run_entry_point(main)
