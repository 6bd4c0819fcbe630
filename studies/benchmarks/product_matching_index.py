"""Throughput and recall of the four index kinds on 100,000 embeddings of 384 numbers.

    python -m studies.benchmarks.product_matching_index --model FOLDER --pairs ../shared/data/matching/walmart_amazon

The vectors are MiniLM embeddings of the real right-hand titles, repeated with random shifts until there are 100,000.
The shifts have the directions in which real titles differ from their neighbours, so the cloud keeps the clusters of a
real catalogue; independent noise would make search either too easy or hopeless. The queries are embeddings of the
left-hand titles, which the index has never seen. Every index gets the same queries, all at once (throughput) and one by
one (latency).

Legend: N vectors, B queries, D embedding width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contracts.errors import run_entry_point
from studies.tables import RESULTS
from training.settings import parse_settings

if TYPE_CHECKING:
    from product_matching.index import CatalogueIndex

K = 10
"""Results per query."""
NEIGHBOURS = 20
"""Neighbours of a vector, itself included, whose differences make up a shift."""
SHIFTS = 3
"""Differences per shift."""
SHIFT_SIZE = 0.4
"""Share of each difference that is added."""
SINGLE_QUERIES = 300
BATCHED_REPEATS = 5


@dataclass
class IndexBenchmarkSettings:
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Encoder: hub id or local folder."""
    pairs: Path = Path("catalogues")
    """Folder with labelled pairs, for real titles."""
    rows: int = 100_000
    """Rows to index."""
    threads: int = 2
    """Threads of faiss."""
    out: Path = RESULTS / "product_matching_index.json"
    """Json file to write."""


def enlarge(vectors: np.ndarray, rows: int, seed: int = 0) -> np.ndarray:
    """`rows` unit vectors (N, D): the given ones, and then moved copies of random ones of them.

    A copy is moved by 0.4 times the difference of two random near neighbours, three times over.
    """
    import faiss

    rng = np.random.default_rng(seed)
    neighbours = faiss.knn(vectors, vectors, NEIGHBOURS, metric=faiss.METRIC_INNER_PRODUCT)[1]
    originals = np.arange(len(vectors))
    source = np.concatenate([originals, rng.integers(len(vectors), size=rows - len(vectors))])
    shift = np.zeros((rows, vectors.shape[1]), np.float32)
    for _ in range(SHIFTS):
        # from 1: the nearest neighbour of a vector is itself
        one = neighbours[source, rng.integers(1, NEIGHBOURS, size=rows)]
        other = neighbours[source, rng.integers(1, NEIGHBOURS, size=rows)]
        shift += SHIFT_SIZE * (vectors[one] - vectors[other])
    shift[originals] = 0
    moved = vectors[source] + shift
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


def seconds_of(index: CatalogueIndex, queries: np.ndarray) -> float:
    """Wall time of one search."""
    started = time.perf_counter()
    index.search(queries, K)
    return time.perf_counter() - started


def search_figures(index: CatalogueIndex, queries: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Recall, throughput and latency of one index.

    Args:
        queries: (B, D).
        exact: (B, K) rows that exact search finds.
    """
    found = index.search(queries, K)[1]
    shares = [len(np.intersect1d(a, b)) / K for a, b in zip(found, exact, strict=True)]
    single = [seconds_of(index, queries[row : row + 1]) for row in range(SINGLE_QUERIES)]
    batched = [seconds_of(index, queries) for _ in range(BATCHED_REPEATS)]
    return {
        "recall_at_10": round(float(np.mean(shares)), 4),
        "queries_per_second": round(len(queries) / float(np.median(batched))),
        "one_query_ms_median": round(1000 * float(np.median(single)), 3),
        "one_query_ms_p95": round(1000 * float(np.quantile(single, 0.95)), 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(IndexBenchmarkSettings, argv, description=__doc__.split("\n")[0])
    import faiss

    from product_matching.catalogue import product_text
    from product_matching.encoder import encode, load_encoder
    from product_matching.index import CatalogueIndex
    from product_matching.pairs import read_pairs
    from product_matching.vector_index import KINDS
    from studies.benchmarks.measure import in_one_line, report

    faiss.omp_set_num_threads(settings.threads)
    pairs = read_pairs(settings.pairs)
    encoder = load_encoder(settings.model, device="cpu")
    vectors = enlarge(encode(encoder, product_text(pairs.right), progress=True), settings.rows)
    queries = encode(encoder, product_text(pairs.left), progress=True)
    exact = faiss.knn(queries, vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    numbers = [str(row) for row in range(settings.rows)]
    catalogue = pd.DataFrame({"id": numbers, "title": numbers})

    rows = []
    for kind in KINDS:
        started = time.perf_counter()
        index = CatalogueIndex.build(catalogue, vectors, kind=kind)
        built = time.perf_counter() - started
        row = {
            "kind": kind,
            "effort": index.meta["effort"],
            "build_s": round(built, 1),
            "recall_at_build": round(index.meta["recall_at_10"], 4),
            **search_figures(index, queries, exact),
        }
        rows.append(row)
        flat = rows[0]
        row["times_flat"] = round(row["queries_per_second"] / flat["queries_per_second"], 1)
        print(in_one_line(row), flush=True)
    report(
        settings.out,
        rows,
        vectors="MiniLM embeddings of real titles with shifts along differences of neighbours; queries are real",
        indexed_rows=settings.rows,
        width=vectors.shape[1],
        queries=len(queries),
        faiss=faiss.__version__,
        faiss_threads=settings.threads,
        load_average=os.getloadavg()[0],
    )


if __name__ == "__main__":
    run_entry_point(main)
