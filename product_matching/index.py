"""A searchable catalogue: embeddings, a faiss index over them, the records, and what they were made with.

    python -m product_matching.index build --catalogue catalogues/right.csv --model checkpoints/product_matching/model
    python -m product_matching.index add --catalogue new_products.csv --model checkpoints/product_matching/model

The folder holds index.json and three files that it names with their sha256: the faiss index, the embeddings
(.npy) and the records (.csv). They get new names at every change and index.json is replaced last, so a reader
sees the old state or the new one. N catalogue rows, B queries, D embedding width.
"""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, read_json, sha256_file, write_json
from product_matching.catalogue import check_catalogue, product_text, read_catalogue
from product_matching.config import IndexSettings
from training.settings import parse_settings

if TYPE_CHECKING:
    import faiss
    from sentence_transformers import SentenceTransformer

SCHEMA = 1
KINDS = ("flat", "hnsw", "ivf", "ivfpq")
FLAT_ROWS, HNSW_ROWS, IVF_ROWS = 20_000, 500_000, 2_000_000
HNSW_LINKS = 32
RERANK = 20
"""IVF-PQ: candidates by compressed distance for each result, ordered again by their exact cosine."""


def choose_kind(rows: int, width: int) -> tuple[str, str]:
    """The index for so many rows, and the reason in words."""
    gigabytes = rows * width * 4 / 1e9
    if rows <= FLAT_ROWS:
        return "flat", f"{rows:,} rows: exact search takes a few milliseconds at most"
    if rows <= HNSW_ROWS:
        return (
            "hnsw",
            f"{rows:,} rows: too many to compare with each, and a graph over {gigabytes:.1f} GB fits into memory",
        )
    if rows <= IVF_ROWS:
        return (
            "ivf",
            f"{rows:,} rows: a graph would take hours to build, the embeddings ({gigabytes:.1f} GB) still fit",
        )
    return (
        "ivfpq",
        f"{rows:,} rows: {gigabytes:.1f} GB of embeddings stay on disk, {rows * width / 8e9:.1f} GB of codes in memory",
    )


@dataclass
class CatalogueIndex:
    """Records and the index over their embeddings; row i of one is row i of the other."""

    catalogue: pd.DataFrame
    vectors: np.ndarray
    """(N, D) float32, rows of length 1; on disk and mapped into memory after loading"""
    index: faiss.Index
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        catalogue: pd.DataFrame,
        vectors: np.ndarray,
        *,
        kind: str = "auto",
        target_recall: float = 0.95,
        **meta: Any,
    ) -> CatalogueIndex:
        """Index `vectors` (N, D) and raise the search effort until recall@10 against exact search is `target_recall`.

        Args:
            meta: stored as given; `model` and `fingerprint` are what `load` compares with.
        """
        catalogue = check_catalogue(catalogue, "catalogue")
        rows, width = vectors.shape
        if rows != len(catalogue):
            raise InputError(f"{len(catalogue)} records and {rows} embeddings do not fit")
        chosen, reason = choose_kind(rows, width) if kind == "auto" else (kind, f"asked for, {rows:,} rows")
        built = cls(catalogue, vectors, _new_faiss_index(chosen, vectors), {**meta})
        built.meta |= {"schema": SCHEMA, "kind": chosen, "kind_setting": kind, "reason": reason, "width": width,
                       "target_recall": target_recall, "trained_rows": rows}  # fmt: skip
        built.index.add(vectors)
        built._tune()
        return built

    def add(self, catalogue: pd.DataFrame, vectors: np.ndarray) -> CatalogueIndex:
        """The index with further records: extended, or built anew where its kind or its training no longer suits."""
        catalogue = check_catalogue(catalogue, "added catalogue")
        if len(known := set(catalogue["id"]) & set(self.catalogue["id"])):
            raise InputError(f"id {sorted(known)[0]} is in the index already ({len(known)} such ids)")
        all_records = pd.concat([self.catalogue, catalogue], ignore_index=True)
        all_vectors = np.concatenate([self.vectors, vectors])
        setting = self.meta["kind_setting"]
        outgrown = setting == "auto" and choose_kind(*all_vectors.shape)[0] != self.meta["kind"]
        if outgrown or len(all_vectors) > 2 * self.meta["trained_rows"]:
            kept = {
                key: self.meta[key]
                for key in ("model", "fingerprint", "max_length", "calibration")
                if key in self.meta
            }
            return self.build(
                all_records, all_vectors, kind=setting, target_recall=self.meta["target_recall"], **kept
            )
        self.index.add(vectors)
        extended = CatalogueIndex(all_records, all_vectors, self.index, dict(self.meta))
        extended._tune()
        return extended

    @cached_property
    def rows_of_category(self) -> dict[str, np.ndarray]:
        return self.catalogue.groupby(self.catalogue["category"].str.lower()).indices

    def search(
        self, queries: np.ndarray, k: int, *, category: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest records of each query.

        Args:
            queries: (B, D) float32, rows of length 1.
            category: search only records of this category (case does not matter), exactly.

        Returns:
            cosine (B, k') falling, row (B, k') int; k' is k or the number of records if that is smaller. An
            approximate index can find fewer: then row is -1 and cosine -inf at the end.
        """
        import faiss

        if category is not None:
            if category.lower() not in self.rows_of_category:
                raise InputError(f"category {category[:80]!r} is not in this catalogue")
            rows = self.rows_of_category[category.lower()]
            cosine, place = faiss.knn(
                queries, self.vectors[rows], min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
            )
            return cosine, rows[place]
        k = min(k, len(self.vectors))
        if self.meta["kind"] == "ivfpq":
            return self._rank(queries, self.index.search(queries, min(RERANK * k, len(self.vectors)))[1], k)
        cosine, rows = self.index.search(queries, k)
        return np.where(rows >= 0, cosine, -np.inf), rows

    def _rank(self, queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Order candidate rows (B, C), -1 for none, by exact cosine."""
        cosine = np.empty(candidates.shape, np.float32)
        for place, (query, rows) in enumerate(zip(queries, candidates, strict=True)):
            cosine[place] = np.where(rows >= 0, self.vectors[rows] @ query, -np.inf)
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(cosine, order, axis=1), np.take_along_axis(candidates, order, axis=1)

    def set_effort(self, effort: int) -> None:
        """efSearch of HNSW, nprobe of IVF: more finds more and takes longer."""
        if self.meta["kind"] == "hnsw":
            self.index.hnsw.efSearch = effort
        elif self.meta["kind"] in ("ivf", "ivfpq"):
            self.index.nprobe = effort
        self.meta["effort"] = effort

    def _tune(self) -> None:
        """Double the effort until recall@10 reaches the target, and store what was measured."""
        queries = shifted_rows(self.vectors, 500)
        effort, most = (16, 2048) if self.meta["kind"] == "hnsw" else (1, getattr(self.index, "nlist", 1))
        self.set_effort(effort)
        while (recall := self.recall(queries)) < self.meta["target_recall"] and effort < most:
            effort = min(2 * effort, most)
            self.set_effort(effort)
        self.meta |= {"rows": len(self.vectors), "recall_at_10": recall, "recall_queries": len(queries)}

    def recall(self, queries: np.ndarray, k: int = 10) -> float:
        """Share of the exact k nearest rows that the index finds, mean over the queries (B, D)."""
        import faiss

        if self.meta["kind"] == "flat":
            return 1.0
        found = self.search(queries, k)[1]
        vectors = np.ascontiguousarray(self.vectors)
        exact = faiss.knn(queries, vectors, found.shape[1], metric=faiss.METRIC_INNER_PRODUCT)[1]
        return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]))

    def save(self, folder: Path | str) -> None:
        """Write the folder; a reader sees the previous state until the last moment."""
        import faiss

        folder = Path(folder)
        name = uuid.uuid4().hex[:8]
        files = {"faiss": f"{name}.faiss", "vectors": f"{name}.npy", "catalogue": f"{name}.csv"}
        with atomic_write(folder / files["faiss"], "wb") as file:
            faiss.write_index(self.index, faiss.PyCallbackIOWriter(file.write))
        with atomic_write(folder / files["vectors"], "wb") as file:
            np.save(file, self.vectors)
        with atomic_write(folder / files["catalogue"]) as file:
            self.catalogue.to_csv(file, index=False)
        sha256 = {kind: sha256_file(folder / file) for kind, file in files.items()}
        write_json(folder / "index.json", {**self.meta, "files": files, "sha256": sha256})
        for old in [*folder.glob("*.faiss"), *folder.glob("*.npy"), *folder.glob("*.csv")]:
            if old.name not in files.values():
                old.unlink()

    @classmethod
    def load(cls, folder: Path | str) -> CatalogueIndex:
        """Verify and read the folder. Raises InputError naming the file that is absent, cut short or changed."""
        import faiss

        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise InputError(f"{folder}: no index.json there; run python -m product_matching.index build")
        meta = read_json(folder / "index.json")
        if meta.get("schema") != SCHEMA:
            raise InputError(
                f"{folder / 'index.json'}: schema {meta.get('schema')!r}, this version reads {SCHEMA}"
            )
        files = {kind: folder / name for kind, name in meta.pop("files").items()}
        for kind, expected in meta.pop("sha256").items():
            if not files[kind].is_file():
                raise InputError(
                    f"{files[kind]}: no such file, but index.json names it; build the index again"
                )
            if (
                sha256_file(files[kind]) != expected
            ):  # before faiss reads it: a cut file can crash the process
                raise InputError(
                    f"{files[kind]}: sha256 differs from index.json; the file is cut short or changed"
                )
        vectors = np.load(files["vectors"], mmap_mode="r", allow_pickle=False)
        loaded = cls(read_catalogue(files["catalogue"]), vectors, faiss.read_index(str(files["faiss"])), meta)
        loaded.set_effort(meta["effort"])
        return loaded

    def require_encoder(self, encoder: SentenceTransformer, name: str) -> None:
        """Raises InputError unless `encoder` is the one whose embeddings are indexed."""
        from product_matching.encoder import fingerprint

        width = encoder.get_embedding_dimension()
        if width != self.meta["width"]:
            raise InputError(
                f"the index holds {self.meta['width']}-d embeddings of model {self.meta['model']}; "
                f"model {name} makes {width}-d ones; build the index again or pass that model"
            )
        if (found := fingerprint(encoder)) != self.meta["fingerprint"]:
            raise InputError(
                f"the index was built with model {self.meta['model']} (weights {self.meta['fingerprint']}); "
                f"model {name} has weights {found}; build the index again or pass that model"
            )


def shifted_rows(vectors: np.ndarray, count: int, cosine: float = 0.8, seed: int = 0) -> np.ndarray:
    """Queries (count, D) that lie at `cosine` from rows of `vectors`, as another shop's listing of a product does.

    The rows themselves would be too easy: a graph search finds a point that it holds more surely than its neighbours.
    """
    rng = np.random.default_rng(seed)
    rows = np.asarray(vectors[np.sort(rng.permutation(len(vectors))[:count])])
    noise = rng.normal(size=rows.shape)
    noise -= (noise * rows).sum(axis=1, keepdims=True) * rows
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return (cosine * rows + np.sqrt(1 - cosine**2) * noise).astype(np.float32)


def _new_faiss_index(kind: str, vectors: np.ndarray) -> faiss.Index:
    """An empty index by inner product, trained on `vectors` where its kind needs that."""
    import faiss

    rows, width = vectors.shape
    cells = max(1, min(round(4 * math.sqrt(rows)), rows // 39))  # faiss asks for 39 training rows a cell
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 80
        return index
    if kind == "ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
    elif kind == "ivfpq":
        if width % 8 or rows < 256:
            raise InputError(
                f"ivfpq needs a width divisible by 8 and at least 256 rows; here {width} and {rows}"
            )
        index = faiss.IndexIVFPQ(
            faiss.IndexFlatIP(width), width, cells, width // 8, 8, faiss.METRIC_INNER_PRODUCT
        )
    else:
        raise InputError(f"--kind {kind}: choose auto, {', '.join(KINDS)}")
    index.cp.min_points_per_centroid = 1  # silences a warning; small catalogues are ours to judge
    sample = np.random.default_rng(0).permutation(rows)[: max(256 * cells, 65_536)]
    index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
    return index


def _calibration(settings: IndexSettings) -> dict[str, float] | None:
    """From --calibration, else calibration.json beside the model, else none."""
    if settings.calibration:
        return read_json(settings.calibration)
    beside = Path(settings.model) / "calibration.json"
    return read_json(beside) if beside.is_file() else None


def main(argv: Sequence[str] | None = None) -> CatalogueIndex:
    settings, command = parse_settings(
        IndexSettings,
        argv,
        description="Build or extend a searchable catalogue.",
        positional={"command": ("build", "add")},
    )
    catalogue = read_catalogue(settings.catalogue)
    from product_matching.encoder import encode, fingerprint, load_encoder

    encoder = load_encoder(settings.model, max_length=settings.max_length, device=settings.device)
    if command == "add":
        present = CatalogueIndex.load(settings.index)
        present.require_encoder(encoder, settings.model)
        index = present.add(catalogue, encode(encoder, product_text(catalogue), progress=True))
    else:
        index = CatalogueIndex.build(
            catalogue, encode(encoder, product_text(catalogue), progress=True),
            kind=settings.kind, target_recall=settings.target_recall, model=settings.model,
            fingerprint=fingerprint(encoder), max_length=settings.max_length, calibration=_calibration(settings),
        )  # fmt: skip
    index.save(settings.index)
    meta = index.meta
    print(f"{meta['kind']} index ({meta['reason']})")
    print(
        f"recall@10 against exact search {meta['recall_at_10']:.3f} at effort {meta['effort']} → {settings.index}"
    )
    return index


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
