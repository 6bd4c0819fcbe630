"""A searchable catalogue: its records, the index over their embeddings, and what both were made with.

    python -m product_matching.index build --catalogue catalogues/right.csv --model checkpoints/product_matching/model
    python -m product_matching.index add --catalogue new_products.csv --model checkpoints/product_matching/model

The folder holds index.json and three files that it names with their sha256: the faiss index (.faiss), the embeddings
(.npy) and the records (.csv). These get new names at every change, and index.json is replaced last. So a reader sees
either the old state or the new one. N catalogue rows, B queries, D embedding width.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from contracts.errors import InputError, listed, run_entry_point
from contracts.files import atomic_write, read_json, read_versioned, sha256_file, write_json
from product_matching.catalogue import check_catalogue, product_text, read_catalogue
from product_matching.config import IndexSettings
from product_matching.vector_index import KINDS, VectorIndex, choose_kind
from training.settings import parse_settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SCHEMA = 1
STALE_AFTER_GROWTH = 2
"""Cells and codes that were learned from the first rows are learned again once the catalogue has grown this much."""
_META_OF_THE_ENCODER = ("model", "fingerprint", "max_length", "calibration")


@dataclass
class CatalogueIndex:
    """Records and the index over their embeddings; row i of one is row i of the other."""

    catalogue: pd.DataFrame
    neighbours: VectorIndex
    meta: dict[str, Any] = field(default_factory=dict)
    """the content of index.json: kind, effort, measured recall, model and its fingerprint"""

    @property
    def vectors(self) -> np.ndarray:
        """(N, D) float32, rows of length 1; after `load` they stay on disk and are mapped into memory."""
        return self.neighbours.vectors

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
        """Index the embeddings and raise the search effort until recall@10 against exact search is `target_recall`.

        Args:
            catalogue: N records.
            vectors: (N, D) float32, rows of length 1.
            kind: one of KINDS, or "auto" to choose by N.
            meta: further entries of index.json. `require_encoder` needs `model` and `fingerprint`.
        """
        catalogue = check_catalogue(catalogue, "catalogue")
        rows, width = vectors.shape
        if rows != len(catalogue):
            raise InputError(f"{len(catalogue)} records and {rows} embeddings do not fit together")
        if kind == "auto":
            chosen, reason = choose_kind(rows, width)
        elif kind in KINDS:
            chosen, reason = kind, f"asked for, {rows:,} rows"
        else:
            raise InputError(f"--kind {kind}: choose auto, {', '.join(KINDS)}")
        meta |= {
            "schema": SCHEMA,
            "kind": chosen,
            "kind_setting": kind,
            "reason": reason,
            "width": width,
            "target_recall": target_recall,
            "trained_rows": rows,
        }
        built = cls(catalogue, VectorIndex.build(chosen, vectors), meta)
        built._tune()
        return built

    def add(self, catalogue: pd.DataFrame, vectors: np.ndarray) -> CatalogueIndex:
        """The index with further records. It is built anew if its kind or its training no longer suits its size.

        This object must not be used afterwards: both may share one faiss index.

        Raises InputError for an id that is in the index already.
        """
        catalogue = check_catalogue(catalogue, "added catalogue")
        known = set(catalogue["id"]) & set(self.catalogue["id"])
        if known:
            raise InputError(f"id {sorted(known)[0]} is in the index already ({len(known)} such ids)")
        all_records = pd.concat([self.catalogue, catalogue], ignore_index=True)

        kind_setting = self.meta["kind_setting"]
        best_kind = choose_kind(len(all_records), self.meta["width"])[0]
        other_kind = kind_setting == "auto" and best_kind != self.meta["kind"]
        stale = len(all_records) > STALE_AFTER_GROWTH * self.meta["trained_rows"]
        if other_kind or stale:
            kept = {name: self.meta[name] for name in _META_OF_THE_ENCODER if name in self.meta}
            return self.build(
                all_records,
                np.concatenate([self.vectors, vectors]),
                kind=kind_setting,
                target_recall=self.meta["target_recall"],
                **kept,
            )
        # the kind still suits, and so do its cells: new rows only have to be sorted into them
        self.neighbours.add(vectors)
        extended = CatalogueIndex(all_records, self.neighbours, dict(self.meta))
        extended._tune()
        return extended

    def _tune(self) -> None:
        """Set the search effort, and note in `meta` what was measured."""
        recall, queries = self.neighbours.tune(self.meta["target_recall"])
        self.meta |= {
            "effort": self.neighbours.effort,
            "rows": len(self.vectors),
            "recall_at_10": recall,
            "recall_queries": queries,
        }

    @cached_property
    def rows_of_category(self) -> dict[str, np.ndarray]:
        """Rows of each category, by its name in lower case."""
        return self.catalogue.groupby(self.catalogue["category"].str.lower()).indices

    @property
    def categories(self) -> list[str]:
        """Names of the categories in lower case, the largest first; "" stands for records without one."""
        return sorted(self.rows_of_category, key=lambda name: (-len(self.rows_of_category[name]), name))

    def search(
        self, queries: np.ndarray, k: int, *, category: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest records of each query.

        Args:
            queries: (B, D) float32, rows of length 1.
            category: search only records of this category, in upper or lower case. Such a search is exact.

        Returns:
            cosine (B, k') falling, and row (B, k') int, where k' is k or the number of records if that is smaller.
            An approximate index can find fewer: then the last rows are -1 with cosine -inf.

        Raises:
            InputError: no record is of this category.
        """
        if category is None:
            return self.neighbours.search(queries, k)
        import faiss

        # an index over all rows could return too few of one category, so its rows are compared directly
        self.require_category(category)
        rows = self.rows_of_category[category.lower()]
        cosine, place = faiss.knn(
            queries, self.vectors[rows], min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
        )
        return cosine, rows[place]

    def require_category(self, category: str) -> None:
        """Raises InputError for a category without records."""
        if category.lower() not in self.rows_of_category:
            known = [name for name in self.categories if name]
            there = f"it has {listed(known)}" if known else "its records have none"
            raise InputError(f"category {category[:80]!r} is not in this catalogue; {there}")

    def save(self, folder: Path | str) -> None:
        """Write the folder. A reader sees its previous state until index.json is replaced."""
        import faiss

        folder = Path(folder)
        name = uuid.uuid4().hex[:8]  # new names: no file that a reader has open is overwritten
        files = {"faiss": f"{name}.faiss", "vectors": f"{name}.npy", "catalogue": f"{name}.csv"}
        with atomic_write(folder / files["faiss"], "wb") as file:
            faiss.write_index(self.neighbours.index, faiss.PyCallbackIOWriter(file.write))
        with atomic_write(folder / files["vectors"], "wb") as file:
            np.save(file, self.vectors)
        with atomic_write(folder / files["catalogue"]) as file:
            self.catalogue.to_csv(file, index=False)
        sha256 = {content: sha256_file(folder / file) for content, file in files.items()}
        # from here on, readers see the new state
        write_json(folder / "index.json", {**self.meta, "files": files, "sha256": sha256})
        for ending in ("faiss", "npy", "csv"):
            for path in folder.glob(f"*.{ending}"):
                if path.name not in files.values():
                    path.unlink()

    @classmethod
    def load(cls, folder: Path | str) -> CatalogueIndex:
        """Verify and read the folder. Raises InputError naming a file that is absent, cut short or changed."""
        import faiss

        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise InputError(f"{folder}: no index.json there; run python -m product_matching.index build")
        meta = read_versioned(folder / "index.json", SCHEMA, "build the index again")
        files = {content: folder / name for content, name in meta.pop("files").items()}
        # before faiss reads its file: one that is cut short can crash the process
        for content, expected in meta.pop("sha256").items():
            path = files[content]
            if not path.is_file():
                raise InputError(f"{path}: no such file, but index.json names it; build the index again")
            if sha256_file(path) != expected:
                raise InputError(f"{path}: sha256 differs from index.json; the file is cut short or changed")
        catalogue = read_catalogue(files["catalogue"])
        # several services on one machine then share the memory of the embeddings
        vectors = np.load(files["vectors"], mmap_mode="r", allow_pickle=False)
        neighbours = VectorIndex(meta["kind"], vectors, faiss.read_index(str(files["faiss"])))
        neighbours.set_effort(meta["effort"])
        return cls(catalogue, neighbours, meta)

    def require_encoder(self, encoder: SentenceTransformer, name: str) -> None:
        """Raises InputError unless the embeddings were made by `encoder`, which the message calls `name`."""
        from product_matching.encoder import fingerprint

        width = encoder.get_embedding_dimension()
        if width != self.meta["width"]:
            raise InputError(
                f"the index holds {self.meta['width']}-d embeddings of model {self.meta['model']}; "
                f"model {name} makes {width}-d ones; build the index again or pass that model"
            )
        found = fingerprint(encoder)
        if found != self.meta["fingerprint"]:
            raise InputError(
                f"the index was built with model {self.meta['model']} (weights {self.meta['fingerprint']}); "
                f"model {name} has weights {found}; build the index again or pass that model"
            )


def read_calibration(settings: IndexSettings) -> dict[str, float] | None:
    """The calibration that --calibration names, else the one in the model's folder, else none."""
    if settings.calibration:
        return read_json(settings.calibration)
    beside_model = Path(settings.model) / "calibration.json"
    return read_json(beside_model) if beside_model.is_file() else None


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
        present.require_encoder(encoder, settings.model)  # embeddings of two encoders cannot be compared
        vectors = encode(encoder, product_text(catalogue), progress=True)
        index = present.add(catalogue, vectors)
    else:
        vectors = encode(encoder, product_text(catalogue), progress=True)
        index = CatalogueIndex.build(
            catalogue,
            vectors,
            kind=settings.kind,
            target_recall=settings.target_recall,
            model=settings.model,
            fingerprint=fingerprint(encoder),
            max_length=settings.max_length,
            calibration=read_calibration(settings),
        )
    index.save(settings.index)
    meta = index.meta
    print(f"{meta['kind']} index ({meta['reason']})")
    print(
        f"recall@10 against exact search is {meta['recall_at_10']:.3f} at effort {meta['effort']} → {settings.index}"
    )
    return index


if __name__ == "__main__":
    run_entry_point(main)
