"""Nearest neighbours among embeddings: which faiss index suits them, how it is built, how hard it searches.

There are four kinds, all by inner product. flat compares a query with every row. hnsw walks a graph of near rows. ivf
sorts rows into cells and searches a few of them. ivfpq does the same on compressed rows, and then orders the best
candidates by their exact cosine. N rows, B queries, D embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import InputError

if TYPE_CHECKING:
    import faiss

KINDS = ("flat", "hnsw", "ivf", "ivfpq")

FLAT_ROWS = 20_000
"""Up to here exact search takes a few milliseconds."""
HNSW_ROWS = 500_000
"""Up to here the links of a graph are affordable; of the kinds measured at 100,000 rows it is the fastest (README)."""
IVF_ROWS = 2_000_000
"""Up to here the embeddings fit into memory; above, only compressed ones do."""

HNSW_LINKS = 32
"""Links per row on the upper layers of the graph, twice as many on the lowest; the default of faiss."""
HNSW_BYTES_PER_ROW = 2 * HNSW_LINKS * 4
"""Memory of a row's links on the lowest layer, which holds every row; the upper layers add little."""
HNSW_BUILD_EFFORT = 80
"""Rows looked at when one is inserted: twice the default of faiss, for better links."""
HNSW_FIRST_EFFORT = 16
"""Rows looked at per search to begin with: the default of faiss."""
HNSW_LARGEST_EFFORT = 2048

CELLS_PER_ROOT = 4
"""Cells per √N of ivf and ivfpq. The guidelines of faiss advise 4 to 16; the fewest train fastest."""
ROWS_PER_CELL = 39
"""faiss warns where a cell has fewer training rows."""
TRAINING_ROWS_PER_CELL = 256
"""faiss trains a cell on no more rows than this."""
LEAST_TRAINING_ROWS = 65_536
"""256 rows for each of the 256 values of a code."""
DIMENSIONS_PER_CODE = 8
"""Numbers that one code of ivfpq stands for: 32 bytes become one."""
BITS_PER_CODE = 8
RERANK = 20
"""Candidates per result that ivfpq orders by exact cosine, since cosines of compressed rows are rough."""

PROBE_QUERIES = 500
"""Queries that recall is measured with while the search effort is set."""
PROBE_COSINE = 0.8
"""Cosine of such a query and a stored row: about that of another shop's listing of the same product."""


def choose_kind(rows: int, width: int) -> tuple[str, str]:
    """The kind of index for so many rows, and the reason in words."""
    vectors_gb = rows * width * 4 / 1e9  # float32
    if rows <= FLAT_ROWS:
        return "flat", f"{rows:,} rows: exact search takes a few milliseconds at most"
    if rows <= HNSW_ROWS:
        return (
            "hnsw",
            f"{rows:,} rows: too many to compare with each, and a graph over {vectors_gb:.1f} GB fits into memory",
        )
    if rows <= IVF_ROWS:
        links_gb = rows * HNSW_BYTES_PER_ROW / 1e9
        return (
            "ivf",
            f"{rows:,} rows: the embeddings ({vectors_gb:.1f} GB) fit into memory, and cells save the "
            f"{links_gb:.1f} GB of links that a graph would add",
        )
    codes_gb = rows * width / DIMENSIONS_PER_CODE / 1e9
    return (
        "ivfpq",
        f"{rows:,} rows: {vectors_gb:.1f} GB of embeddings stay on disk, {codes_gb:.1f} GB of codes in memory",
    )


@dataclass
class VectorIndex:
    """Embeddings and the faiss index over them; row i of one is row i of the other."""

    kind: str
    """one of KINDS"""
    vectors: np.ndarray
    """(N, D) float32, rows of length 1; in memory or mapped from disk"""
    index: faiss.Index
    effort: int = 1
    """efSearch of hnsw (rows looked at), nprobe of ivf and ivfpq (cells searched); flat has no effort"""

    @classmethod
    def build(cls, kind: str, vectors: np.ndarray) -> VectorIndex:
        """Train an index of this kind on `vectors` (N, D) and add them to it.

        Raises InputError for ivfpq when the width is not divisible by 8 or there are fewer than 256 rows.
        """
        index = _new_faiss_index(kind, vectors)
        index.add(vectors)
        return cls(kind, vectors, index)

    def add(self, vectors: np.ndarray) -> None:
        """Add rows, without training the index again."""
        self.index.add(vectors)
        self.vectors = np.concatenate([self.vectors, vectors])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of each query (B, D): cosine (B, k') falling, and row (B, k') int.

        k' is k, or N if that is smaller. An approximate index can find fewer: then the last rows are -1 with
        cosine -inf.
        """
        k = min(k, len(self.vectors))
        if self.kind == "ivfpq":
            # only the compressed rows are in memory: read the full ones of the candidates alone
            candidates = self.index.search(queries, min(RERANK * k, len(self.vectors)))[1]
            return self._rank_exactly(queries, candidates, k)
        cosine, rows = self.index.search(queries, k)
        # where faiss finds nothing it gives row -1 and the smallest float
        return np.where(rows >= 0, cosine, -np.inf), rows

    def _rank_exactly(
        self, queries: np.ndarray, candidates: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k of the candidate rows (B, C), -1 for none, by exact cosine."""
        cosine = np.empty(candidates.shape, np.float32)
        for number, (query, rows) in enumerate(zip(queries, candidates, strict=True)):
            cosine[number] = np.where(rows >= 0, self.vectors[rows] @ query, -np.inf)
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(cosine, best, axis=1), np.take_along_axis(candidates, best, axis=1)

    def set_effort(self, effort: int) -> None:
        """More effort finds more and takes longer."""
        self.effort = effort
        if self.kind == "hnsw":
            self.index.hnsw.efSearch = effort
        elif self.kind in ("ivf", "ivfpq"):
            self.index.nprobe = effort

    def tune(self, target_recall: float) -> tuple[float, int]:
        """Double the effort until recall@10 reaches the target.

        Returns:
            The recall that was reached, and the number of queries that it was measured with.
        """
        effort, largest = 1, 1
        if self.kind == "hnsw":
            effort, largest = HNSW_FIRST_EFFORT, HNSW_LARGEST_EFFORT
        elif self.kind in ("ivf", "ivfpq"):
            largest = self.index.nlist
        # what is measured now decides the effort of every later search
        queries = shifted_rows(self.vectors, PROBE_QUERIES, PROBE_COSINE)
        self.set_effort(effort)
        recall = self.recall(queries)
        while recall < target_recall and effort < largest:
            effort = min(2 * effort, largest)
            self.set_effort(effort)
            recall = self.recall(queries)
        return recall, len(queries)

    def recall(self, queries: np.ndarray, k: int = 10) -> float:
        """Share of the exact k nearest rows that the index finds, as a mean over the queries (B, D)."""
        import faiss

        if self.kind == "flat":
            return 1.0
        found = self.search(queries, k)[1]  # (B, k')
        k = found.shape[1]  # fewer than k in a small catalogue
        vectors = np.ascontiguousarray(self.vectors)  # also of a memory map
        exact = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
        shares = [len(np.intersect1d(a, b)) / k for a, b in zip(found, exact, strict=True)]
        return float(np.mean(shares))


def shifted_rows(vectors: np.ndarray, count: int, cosine: float, seed: int = 0) -> np.ndarray:
    """Queries (count, D) that lie at exactly `cosine` from rows of `vectors`, as if from another shop.

    The rows themselves would be too easy as queries: a graph search finds a stored row more surely than its neighbours.
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(vectors))[:count])
    rows = np.asarray(vectors[chosen])
    # a random direction at a right angle to each row
    noise = rng.normal(size=rows.shape)
    noise -= (noise * rows).sum(axis=1, keepdims=True) * rows
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    shifted = cosine * rows + np.sqrt(1 - cosine**2) * noise
    return shifted.astype(np.float32)


def _new_faiss_index(kind: str, vectors: np.ndarray) -> faiss.Index:
    """An empty index, trained on `vectors` (N, D) where its kind needs that."""
    import faiss

    rows, width = vectors.shape
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_BUILD_EFFORT
        return index

    cells = round(CELLS_PER_ROOT * math.sqrt(rows))
    cells = max(1, min(cells, rows // ROWS_PER_CELL))  # a small catalogue has fewer
    if kind == "ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
    else:
        values = 2**BITS_PER_CODE
        if width % DIMENSIONS_PER_CODE or rows < values:
            raise InputError(
                f"ivfpq needs a width divisible by {DIMENSIONS_PER_CODE} and at least {values} rows; "
                f"here {width} and {rows}"
            )
        codes = width // DIMENSIONS_PER_CODE
        index = faiss.IndexIVFPQ(
            faiss.IndexFlatIP(width), width, cells, codes, BITS_PER_CODE, faiss.METRIC_INNER_PRODUCT
        )
    index.cp.min_points_per_centroid = 1  # no warning for small catalogues: their recall is measured anyway
    training_rows = max(TRAINING_ROWS_PER_CELL * cells, LEAST_TRAINING_ROWS)
    # sorted, so that a memory map is read from front to back
    sample = np.random.default_rng(0).permutation(rows)[:training_rows]
    index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
    return index
