"""What a similarity compares of a product: blocks of words, views of meaning, and amounts.

Legend: N or n or m rows, C comparisons (blocks, views, amounts).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
import torch
from torch import Tensor

from word_models.features import Features

COMMON = 0.1
"""A term in more than this fraction of the fitted rows is common. Its column is multiplied as a dense one, which takes
a fraction of the time; for rarer terms the sparse product is faster."""
FEW_ROWS = 16
"""For at most this many asked rows, choosing the common terms takes longer than it saves."""


@dataclass
class ComparedRows:
    """The part of `Features` that is compared, ready for comparison, of N rows in the same order."""

    words: tuple[sparse.csr_matrix, ...]
    """(N, V of the block) float32 each: one block of words, rows of length 1"""
    views: tuple[np.ndarray, ...]
    """(N, D) float32 each: one view of meaning, rows of length 1 or 0"""
    amounts: dict[str, np.ndarray]
    """(N, columns) float32 each: standardised amounts that are compared together, under their name"""
    amount: np.ndarray
    """(N,) float32: the standardised logarithm of the total amount"""

    @classmethod
    def of(cls, features: Features) -> ComparedRows:
        from sklearn.preprocessing import normalize

        words = [normalize(features.terms[:, block]) for block in features.compared_terms]
        amounts = {name: features.columns_named(name) for name in features.compared_columns}
        return cls(tuple(words), features.meanings, amounts, features.amount)

    def __len__(self) -> int:
        return len(self.amount)

    def __getitem__(self, rows: np.ndarray) -> ComparedRows:
        """The same of some rows, given as positions."""
        return ComparedRows(
            tuple(block[rows] for block in self.words),
            tuple(view[rows] for view in self.views),
            {name: columns[rows] for name, columns in self.amounts.items()},
            self.amount[rows],
        )

    def double(self) -> ComparedRows:
        """The same rows in float64."""
        return ComparedRows(
            tuple(block.astype(np.float64) for block in self.words),
            tuple(view.astype(np.float64) for view in self.views),
            {name: columns.astype(np.float64) for name, columns in self.amounts.items()},
            self.amount.astype(np.float64),
        )

    @property
    def comparisons(self) -> int:
        """C"""
        return len(self.words) + len(self.views) + len(self.amounts)

    def differences(self, fit: ComparedRows) -> Tensor:
        """How each of these m rows differs from each of the n rows of `fit` in each comparison, (C, m, n).

        Blocks of words and views of meaning differ by 1 − cosine, amounts by half the squared distance. The result has
        the precision of these rows (`double`).
        """
        dtype = torch.from_numpy(self.amount).dtype
        # filled in place: stacking a list would hold everything twice
        found = torch.zeros(fit.comparisons, len(self), len(fit), dtype=dtype)
        blocks = list(zip(self.words, fit.words, strict=True))
        views = list(zip(self.views, fit.views, strict=True))
        for position, (asked_block, fit_block) in enumerate(blocks):
            found[position] = 1 - torch.from_numpy(_product(asked_block, fit_block))
        for position, (asked_view, fit_view) in enumerate(views, start=len(blocks)):
            found[position] = 1 - torch.from_numpy(asked_view @ fit_view.T)
        for position, name in enumerate(fit.amounts, start=len(blocks) + len(views)):
            asked_columns = torch.from_numpy(self.amounts[name].T)
            fit_columns = torch.from_numpy(fit.amounts[name].T)
            # |a|² + |b|² − 2ab would lose the small distances that matter
            for asked_column, fit_column in zip(asked_columns, fit_columns, strict=True):
                distance = asked_column[:, None] - fit_column  # (m, n)
                found[position].addcmul_(distance, distance, value=0.5)
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as named arrays, which `from_arrays` takes."""
        found = {"amount": self.amount}
        for position, block in enumerate(self.words):
            found[f"words_{position}_values"] = block.data
            found[f"words_{position}_columns"] = block.indices
            found[f"words_{position}_row_starts"] = block.indptr
            found[f"words_{position}_shape"] = np.array(block.shape)
        for position, view in enumerate(self.views):
            found[f"view_{position}"] = view
        for position, columns in enumerate(self.amounts.values()):
            found[f"amounts_{position}"] = columns
        return found

    @classmethod
    def from_arrays(
        cls, arrays: dict[str, np.ndarray], *, blocks: int, views: int, amounts: list[str]
    ) -> ComparedRows:
        """Args: the numbers of blocks of words and of views, and the names of the amounts in their order."""
        words = []
        for position in range(blocks):
            values = arrays[f"words_{position}_values"]
            columns = arrays[f"words_{position}_columns"]
            row_starts = arrays[f"words_{position}_row_starts"]
            shape = tuple(arrays[f"words_{position}_shape"].tolist())
            words.append(sparse.csr_matrix((values, columns, row_starts), shape))
        found_views = [arrays[f"view_{position}"] for position in range(views)]
        found_amounts = {name: arrays[f"amounts_{position}"] for position, name in enumerate(amounts)}
        return cls(tuple(words), tuple(found_views), found_amounts, arrays["amount"])


def _product(asked: sparse.csr_matrix, fit: sparse.csr_matrix) -> np.ndarray:
    """(m, V) and (n, V) → (m, n) products of all pairs of rows.

    A sparse product takes a step per pair of rows that share a term. Neighbours share more terms the more rows there
    are to choose them from, so that without the dense part the time per row would grow with the catalogue.
    """
    if asked.shape[0] <= FEW_ROWS:
        return (fit @ asked.T).toarray().T
    common = fit.getnnz(axis=0) > COMMON * fit.shape[0]
    found = asked[:, common].toarray() @ fit[:, common].toarray().T
    found += (asked[:, ~common] @ fit[:, ~common].T).toarray()
    return found
