"""The prices of the most similar products by the cosine of all terms.

Legend: n fitted rows, m asked rows, V terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sparse

from word_models.config import WordModelSettings
from word_models.features import Features

NEIGHBOURS = 20
NEIGHBOUR_POWER = 4
"""A neighbour's weight is its similarity to this power: near ones count far more than the twentieth."""
NEIGHBOUR_MIN_WEIGHT = 1e-9
"""Weight of a neighbour without a common term. If all are such, their plain mean is the answer."""
ROWS_AT_ONCE = 512
"""Asked rows that are compared together with all fitted rows. The number bounds memory."""


class NeighbourPrices(NamedTuple):
    """What the NEIGHBOURS most similar fitted rows say of m rows, (m,) each."""

    mean: np.ndarray
    """ln price, weighted by a power of the similarity"""
    nearest: np.ndarray
    """ln price of the most similar row"""
    similarity: np.ndarray
    """cosine of the most similar row"""


@dataclass
class Neighbours:
    """A model whose answer is the weighted mean ln price of the most similar products."""

    terms: sparse.csr_matrix
    """(n, V) of the fitted rows, each of length 1"""
    ln_price: np.ndarray
    """(n,)"""

    @classmethod
    def fit(cls, settings: WordModelSettings, features: Features, ln_price: np.ndarray) -> Neighbours:
        from sklearn.preprocessing import normalize

        return cls(normalize(features.terms), ln_price)

    def predict(self, features: Features) -> np.ndarray:
        """ln price, (m,)."""
        return self.prices(features).mean

    def prices(self, asked: Features, *, skip_self: bool = False) -> NeighbourPrices:
        """What the most similar fitted rows say of the m asked rows.

        `skip_self`: the asked rows are the fitted ones, and none may see its own price.
        """
        from sklearn.preprocessing import normalize

        asked_terms = normalize(asked.terms)
        parts = []
        for start in range(0, len(asked), ROWS_AT_ONCE):
            similarity = (asked_terms[start : start + ROWS_AT_ONCE] @ self.terms.T).toarray()  # (rows, n)
            if skip_self:
                rows = np.arange(len(similarity))
                similarity[rows, start + rows] = 2.0  # above any cosine, so that the row itself is the first
                nearest = _most_similar(similarity, NEIGHBOURS + 1)[:, 1:]
            else:
                nearest = _most_similar(similarity, NEIGHBOURS)
            near = np.take_along_axis(similarity, nearest, axis=1)  # (rows, NEIGHBOURS)
            price = self.ln_price[nearest]  # (rows, NEIGHBOURS)
            weight = near**NEIGHBOUR_POWER + NEIGHBOUR_MIN_WEIGHT
            mean = (weight * price).sum(axis=1) / weight.sum(axis=1)
            parts.append(NeighbourPrices(mean, price[:, 0], near[:, 0]))
        return NeighbourPrices(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def save(self, folder: Path) -> None:
        """Write neighbours_terms.npz and neighbours.npz."""
        sparse.save_npz(folder / "neighbours_terms.npz", self.terms, compressed=False)
        np.savez(folder / "neighbours.npz", ln_price=self.ln_price)

    @classmethod
    def load(cls, folder: Path) -> Neighbours:
        with np.load(folder / "neighbours.npz") as arrays:
            return cls(sparse.load_npz(folder / "neighbours_terms.npz"), arrays["ln_price"])


def _most_similar(similarity: np.ndarray, count: int) -> np.ndarray:
    """(rows, n) → (rows, count) positions of the highest values, in falling order; count is at most NEIGHBOURS + 1."""
    # sorting only what a partition leaves takes a fraction of the time of sorting all
    found = np.argpartition(-similarity, NEIGHBOURS, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(similarity, found, axis=1), axis=1)
    return np.take_along_axis(found, order, axis=1)
