"""Throughput and recall of the four index kinds on 100,000 embeddings of 384 numbers.

    python -m studies.benchmarks.product_matching_index --model FOLDER --pairs ../shared/data/matching/walmart_amazon \\
        --out studies/results/product_matching_index.json

The vectors are MiniLM embeddings of the real right-hand titles, each repeated with random shifts until there are
100,000: the shifts have the directions in which real titles differ from their neighbours, so the cloud keeps
the clusters of a real catalogue and is not the easy or hopeless case of independent noise. Queries are embeddings of
the left-hand titles, which the index has never seen. Flat and approximate search get the same queries, batched
(throughput) and one by one (latency).
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from contracts.errors import run_entry_point
from contracts.files import write_json
from training.settings import parse_settings


@dataclass
class BenchmarkSettings:
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """encoder: hub id or local folder"""
    pairs: str = "catalogues"
    """folder with labelled pairs, for real titles"""
    rows: int = 100_000
    """rows to index"""
    out: str = "studies/results/product_matching_index.json"
    """json file to write"""
    threads: int = 2
    """threads of faiss"""


def enlarge(vectors: np.ndarray, rows: int, seed: int = 0) -> np.ndarray:
    """`rows` unit vectors around the given ones: each plus 0.4 times the difference of two random near neighbours."""
    import faiss

    rng = np.random.default_rng(seed)
    neighbours = faiss.knn(vectors, vectors, 20, metric=faiss.METRIC_INNER_PRODUCT)[1]
    source = np.concatenate([np.arange(len(vectors)), rng.integers(len(vectors), size=rows - len(vectors))])
    shift = np.zeros((rows, vectors.shape[1]), np.float32)
    for _ in range(3):
        a, b = (neighbours[source, rng.integers(1, 20, size=rows)] for _ in range(2))
        shift += 0.4 * (vectors[a] - vectors[b])
    shift[: len(vectors)] = 0
    moved = vectors[source] + shift
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def measure(index, queries: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    found = index.search(queries, 10)[1]
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, exact, strict=True)])
    single = [seconds(lambda query=queries[row : row + 1]: index.search(query, 10), 1) for row in range(300)]
    return {
        "recall_at_10": round(float(recall), 4),
        "queries_per_second": round(len(queries) / seconds(lambda: index.search(queries, 10), 5)),
        "one_query_ms_median": round(1000 * float(np.median(single)), 3),
        "one_query_ms_p95": round(1000 * float(np.quantile(single, 0.95)), 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(BenchmarkSettings, argv, description="Measure the index kinds.")
    import faiss

    from product_matching.catalogue import product_text
    from product_matching.encoder import encode, load_encoder
    from product_matching.index import KINDS, CatalogueIndex
    from product_matching.pairs import read_pairs

    faiss.omp_set_num_threads(settings.threads)
    pairs = read_pairs(settings.pairs)
    encoder = load_encoder(settings.model, device="cpu")
    vectors = enlarge(encode(encoder, product_text(pairs.right), progress=True), settings.rows)
    queries = encode(encoder, product_text(pairs.left), progress=True)
    exact = faiss.knn(queries, vectors, 10, metric=faiss.METRIC_INNER_PRODUCT)[1]
    ids = [str(row) for row in range(settings.rows)]
    catalogue = pd.DataFrame({"id": ids, "title": ids})
    rows = []
    for kind in KINDS:
        start = time.perf_counter()
        index = CatalogueIndex.build(catalogue, vectors, kind=kind)
        built = time.perf_counter() - start
        row = {"kind": kind, "effort": index.meta["effort"], "build_s": round(built, 1),
               "recall_at_build": round(index.meta["recall_at_10"], 4), **measure(index, queries, exact)}  # fmt: skip
        row["times_flat"] = round(row["queries_per_second"] / (rows or [row])[0]["queries_per_second"], 1)
        rows.append(row)
        print(row, flush=True)
    write_json(settings.out, {
        "command": "python -m studies.benchmarks.product_matching_index",
        "rows": settings.rows, "width": vectors.shape[1],
        "queries": len(queries), "threads": settings.threads, "cores": os.cpu_count(), "machine": platform.machine(),
        "load_average": os.getloadavg()[0], "faiss": faiss.__version__, "results": rows,
        "vectors": "MiniLM embeddings of real titles with shifts along differences of neighbours; queries are real",
    })  # fmt: skip


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
