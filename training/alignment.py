"""One space for the encoders of an out-of-fold run.

The encoders of different folds span different spaces. The embeddings of each are brought into the space of the encoder
of all rows, which embeds every other table, by the rotation that fits best on rows that both were fitted on.

Legend: n chosen rows, D_in width of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from contracts.splits import Roles, roles

ALIGNMENT_ROWS = 2048
"""Most rows that a rotation is fitted on. Several times the width is enough."""
TOWARDS_IDENTITY = 1e-10
"""Weight of the identity beside the rows. It decides only what they leave open, such as with fewer rows than columns:
encoders that were trained from the same weights differ little."""


@dataclass
class Alignment:
    """x ↦ (x − source_mean) R + target_mean: a rotation (or reflection) and a shift, which keep all distances."""

    source_mean: np.ndarray
    """(D_in,)"""
    rotation: np.ndarray
    """R (D_in, D_in), orthogonal"""
    target_mean: np.ndarray
    """(D_in,)"""

    @classmethod
    def fit(cls, source: np.ndarray, target: np.ndarray, *, shift: bool = True) -> Alignment:
        """The alignment that brings `source` (n, D_in) nearest to `target` (n, D_in) in least squares.

        R = U Vᵀ with U S Vᵀ = (source − mean)ᵀ (target − mean): Schönemann 1966, "A generalized solution of the
        orthogonal Procrustes problem".

        Args:
            shift: without it both means are 0, and embeddings of unit length keep their length.
        """
        width = source.shape[1]
        source = source.astype(np.float64)
        target = target.astype(np.float64)
        source_mean = source.mean(axis=0) if shift else np.zeros(width)
        target_mean = target.mean(axis=0) if shift else np.zeros(width)
        covariance = (source - source_mean).T @ (target - target_mean)
        largest = max(np.linalg.norm(covariance, 2), np.finfo(float).tiny)
        u, _, vt = np.linalg.svd(covariance / largest + TOWARDS_IDENTITY * np.eye(width))
        return cls(source_mean, u @ vt, target_mean)

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, D_in) to (n, D_in)"""
        return (embeddings - self.source_mean) @ self.rotation + self.target_mean

    def inverse(self, embeddings: np.ndarray) -> np.ndarray:
        """What `__call__` was given, from what it returned: (n, D_in) to (n, D_in)."""
        return (embeddings - self.target_mean) @ self.rotation.T + self.source_mean


def alignment_rows(fold: np.ndarray, part: Roles, random: np.random.Generator) -> np.ndarray:
    """Numbers of the rows that an alignment is fitted on, ascending.

    Args:
        fold: (N,) int, of the training rows.
        part: folds of the encoder that is aligned; the encoder of all rows is the other one.
        random: chooses among them where there are more than ALIGNMENT_ROWS.
    """
    fitted_by_both = set(part.fit) & set(roles(None).fit)
    candidates = np.flatnonzero(np.isin(fold, sorted(fitted_by_both)))
    size = min(len(candidates), ALIGNMENT_ROWS)
    return np.sort(random.choice(candidates, size, replace=False))
