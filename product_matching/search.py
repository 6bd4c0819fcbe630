"""Find the products of an indexed catalogue that match a title.

python -m product_matching.search "sony dsc-w120 7.2mp camera" --index index
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from product_matching.calibration import Calibration, confidence_band
from product_matching.catalogue import product_text
from product_matching.config import SearchSettings
from product_matching.decision import DecisionModel
from product_matching.encoder import encode, load_encoder
from product_matching.index import CatalogueIndex
from training.settings import parse_settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


RERANKED = 20
"""Records that a decision orders again, or as many as are asked for if these are more."""


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
    """that this record is the same product, by the decision, or else by the calibration on the validation pairs"""
    confidence: str | None
    """high (probability above 0.85), medium (above 0.75) or low"""


@dataclass
class Matcher:
    """An index with the encoder that made it, and a decision that orders what it finds again, if there is one."""

    index: CatalogueIndex
    encoder: SentenceTransformer
    decision: DecisionModel | None = None

    @classmethod
    def load(cls, folder: Path | str, model: str = "", device: str = "auto", decision: str = "") -> Matcher:
        """Raises InputError for a damaged index, or a model or decision of other embeddings than the indexed ones.

        Args:
            model: hub id or local folder; empty: the one that the index names.
            decision: folder of a trained decision; empty: records are ordered by their cosine.
        """
        index = CatalogueIndex.load(folder)
        name = model or index.meta["model"]
        encoder = load_encoder(name, max_length=index.meta["max_length"], device=device)
        index.require_encoder(encoder, name)
        if not decision:
            return cls(index, encoder)
        return cls(index, encoder, DecisionModel.load(decision, device=device, encoder=encoder))

    def match(self, titles: list[str], k: int = 5, category: str | None = None) -> list[list[Match]]:
        """For each title at most `k` records, the most probable or similar first; fewer if the index finds fewer."""
        if category is not None:
            self.index.require_category(category)  # before the titles are encoded, which takes longer
        # a title alone: the encoder reads it as it reads a record without brand and model number
        queries = pd.DataFrame({"title": titles, "brand": "", "model": ""})
        vectors = encode(self.encoder, product_text(queries))
        wanted = k if self.decision is None else max(k, RERANKED)
        cosines, rows = self.index.search(vectors, wanted, category=category)
        if self.decision is not None:
            return self._reranked(self.decision, queries, vectors, rows, k)
        stored = self.index.meta.get("calibration")
        calibration = Calibration(**stored) if stored else None
        results = []
        for cosines_of_title, rows_of_title in zip(cosines.tolist(), rows.tolist(), strict=True):
            matches = []
            for row, cosine in zip(rows_of_title, cosines_of_title, strict=True):
                if row < 0:
                    continue
                probability = float(calibration.probability(cosine)) if calibration else None
                matches.append(self._match(row, cosine, probability))
            results.append(matches)
        return results

    def _reranked(
        self, decision: DecisionModel, queries: pd.DataFrame, vectors: np.ndarray, rows: np.ndarray, k: int
    ) -> list[list[Match]]:
        """The `k` most probable of the records found, `rows` (B, candidates) int, for each query."""
        query_of_pair, place = np.nonzero(rows >= 0)
        found, record_of_pair = np.unique(rows[query_of_pair, place], return_inverse=True)
        left = decision.records(queries, vectors)
        right = decision.records(self.index.catalogue.iloc[found], np.asarray(self.index.vectors[found]))
        verdicts = decision.decide(left, right, np.stack([query_of_pair, record_of_pair], axis=1))
        results: list[list[Match]] = [[] for _ in range(len(queries))]
        for pair in np.argsort(-verdicts.probability, kind="stable").tolist():
            matches = results[query_of_pair[pair]]
            if len(matches) < k:
                row = int(found[record_of_pair[pair]])
                matches.append(
                    self._match(row, float(verdicts.evidence.cosine[pair]), float(verdicts.probability[pair]))
                )
        return results

    def _match(self, row: int, cosine: float, probability: float | None) -> Match:
        record = self.index.catalogue.iloc[row]
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
    matcher = Matcher.load(settings.index, settings.model, settings.device, settings.decision)
    matches = matcher.match([title], settings.k, settings.category or None)[0]
    for match in matches:
        confidence = ""
        if match.probability is not None:
            confidence = f"  p {match.probability:.2f} {match.confidence:6s}"
        print(f"{match.cosine:.3f}{confidence}  {match.id}  {match.title}")
    return matches


if __name__ == "__main__":
    run_entry_point(main)
