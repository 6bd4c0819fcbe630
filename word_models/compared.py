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

    @property
    def comparisons(self) -> int:
        """C"""
        return len(self.words) + len(self.views) + len(self.amounts)

    def differences(self, fit: ComparedRows) -> Tensor:
        """How each of these m rows differs from each of the n rows of `fit` in each comparison, (C, m, n).

        Blocks of words and views of meaning differ by 1 − cosine, amounts by half the squared distance.
        """
        cosines = []
        for asked_block, fit_block in zip(self.words, fit.words, strict=True):
            cosines.append((asked_block @ fit_block.T).toarray())  # (m, n)
        for asked_view, fit_view in zip(self.views, fit.views, strict=True):
            cosines.append(asked_view @ fit_view.T)

        # filled in place: stacking a list would hold everything twice
        found = torch.empty(fit.comparisons, len(self), len(fit))
        for position, cosine in enumerate(cosines):
            found[position] = 1 - torch.from_numpy(cosine)
        for position, name in enumerate(fit.amounts, start=len(cosines)):
            asked_amount = torch.from_numpy(self.amounts[name])
            fit_amount = torch.from_numpy(fit.amounts[name])
            # the default computes |a|² + |b|² − 2ab, which loses the small distances that matter
            distance = torch.cdist(asked_amount, fit_amount, compute_mode="donot_use_mm_for_euclid_dist")
            found[position] = distance.square_().mul_(0.5)
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
