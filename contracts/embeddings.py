"""The embedding file: what an encoder stage hands to fusion.

`data/embeddings/<name>_<split>.pkl` is a pickled plain dict: `sample_ids` (N,) str, `embeddings` (N, D_in)
float32 or float16, `valid` (N,) bool, `meta` dict. Beside it `<file>.json` holds the meta and the sha256 of the
pickle. Nothing is unpickled before the hash fits: without it nearly every flipped bit loads silently. The reader can
build arrays and nothing else, and no more of them than the file has bytes for, so a file from a stranger can neither
run code nor use up the memory. A picture or text that could not be embedded has valid=False; rows are joined by
sample_id, never by position.

While it is being made, the content lives in `<file>.shards/`, one file per shard, so that an interrupted extraction
resumes where it stopped and needs memory for one shard only. A catalogue too large for one array stays in that form
(`index.json` is written last) and is read shard by shard with `iterate_embeddings`.
"""

from __future__ import annotations

import os
import pickle
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from contracts.errors import InputError, listed
from contracts.files import atomic_write, read_json, sha256_file, sidecar_of, write_json
from contracts.splits import N_FOLDS

SCHEMA = 1
REQUIRED_META = ("name", "split", "model", "checkpoint", "fitted_on", "split_hash", "command")
"""`checkpoint` identifies the encoder's weights: embeddings of two encoders live in different spaces."""
MOST_MEMO_PLACES = 10_000
"""Objects that a pickle may remember; a file of ours has one per entry of its meta."""
LONGEST_READ = 65_536
"""Bytes; the content of an array is longer, and nothing else in a file of ours is."""
_SAFE_GLOBALS = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in [
        ("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"),
    ]
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}  # fmt: skip


@dataclass
class Embeddings:
    """One encoder's view of one table. `valid[i]` False means row i holds no information."""

    sample_ids: np.ndarray
    """(N,) str"""
    embeddings: np.ndarray
    """(N, D_in) float32 or float16"""
    valid: np.ndarray
    """(N,) bool"""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.embeddings.shape[1]


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def write_embeddings(path: Path | str, content: Embeddings) -> None:
    """Write the pickle and its .json atomically. Raises InputError when the content breaks the contract."""
    path = Path(path)
    meta = {"schema": SCHEMA, **content.meta}
    missing = [key for key in REQUIRED_META if key not in meta]
    if missing:
        raise InputError(f"{path}: embedding meta lacks {', '.join(missing)}")
    content = Embeddings(np.asarray(content.sample_ids, np.str_), content.embeddings, content.valid, meta)
    _check(path, content)
    as_dict = {
        "sample_ids": content.sample_ids, "embeddings": np.ascontiguousarray(content.embeddings),
        "valid": content.valid, "meta": meta,
    }  # fmt: skip
    sidecar_of(path).unlink(
        missing_ok=True
    )  # a crash between the two renames leaves no json rather than a wrong one
    with atomic_write(path, "wb") as file:
        pickle.dump(as_dict, file, protocol=5)
    write_json(
        sidecar_of(path),
        {**meta, "rows": len(content.valid), "width": content.width, "sha256": sha256_file(path)},
    )


def read_embeddings(path: Path | str) -> Embeddings:
    """Verify and load one embedding file. Raises InputError naming the file for anything that is not right."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such embedding file; run the stage that writes it")
    if sha256_file(path) != read_json(sidecar_of(path)).get("sha256"):
        raise InputError(
            f"{path}: sha256 differs from {sidecar_of(path).name}; the file is damaged or was changed"
        )
    return _load(path)


def _load(path: Path) -> Embeddings:
    try:
        _require_small_memo(path)
        with open(path, "rb") as file:
            content = _ArraysOnly(file).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        MemoryError,
        RecursionError,
    ) as error:
        raise InputError(f"{path}: not an embedding file ({error})") from None
    if not isinstance(content, dict) or set(content) != {"sample_ids", "embeddings", "valid", "meta"}:
        raise InputError(f"{path}: not an embedding file (expected sample_ids, embeddings, valid, meta)")
    loaded = Embeddings(**content)
    arrays = [
        array
        for array in (loaded.sample_ids, loaded.embeddings, loaded.valid)
        if isinstance(array, np.ndarray)
    ]
    if sum(array.nbytes for array in arrays) > path.stat().st_size:
        raise InputError(
            f"{path}: its arrays are larger than the file, so it was not written by this program"
        )
    _check(path, loaded)
    return loaded


def _require_small_memo(path: Path) -> None:
    """Raise UnpicklingError for a place in the unpickler's memo that a file of this kind cannot have.

    The unpickler makes room for every place up to the one that is named: nine bytes would take gigabytes.
    """
    with open(path, "rb") as file:
        places = 0
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], _Outline(file))):
            if opcode.name == "MEMOIZE":
                places += 1
            elif opcode.name.endswith("PUT"):
                places = max(places, int(argument or 0))
            if places > MOST_MEMO_PLACES:
                raise pickle.UnpicklingError(f"it names place {places} of the memo")


class _Outline:
    """A pickle as pickletools reads it, but what lies in its arrays is passed over, neither read nor copied."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.readline = file.readline
        self.tell = file.tell

    def read(self, length: int) -> bytes:
        if length <= LONGEST_READ:
            return self.file.read(length)
        if self.file.tell() + length > self.size:
            return b""  # pickletools says that the content ends too early
        self.file.seek(length, os.SEEK_CUR)
        return _PassedOver(length)


class _PassedOver(bytes):
    """No content, but the length that pickletools expects."""

    def __new__(cls, length: int) -> _PassedOver:
        empty = super().__new__(cls)
        empty.length = length
        return empty

    length: int

    def __len__(self) -> int:
        return self.length


def _check(path: Path, content: Embeddings) -> None:
    ids, matrix, valid, meta = content.sample_ids, content.embeddings, content.valid, content.meta
    if not all(isinstance(array, np.ndarray) for array in (ids, matrix, valid)) or not isinstance(meta, dict):
        raise InputError(f"{path}: sample_ids, embeddings and valid must be numpy arrays and meta a dict")
    if meta.get("schema") != SCHEMA:
        raise InputError(f"{path}: schema {meta.get('schema')!r}, this version reads {SCHEMA}")
    if matrix.ndim != 2 or matrix.dtype not in (np.float32, np.float16):
        raise InputError(
            f"{path}: embeddings are {matrix.dtype}{list(matrix.shape)}, expected float32 or float16 [N, D]"
        )
    if matrix.shape[1] == 0:
        raise InputError(f"{path}: embeddings of width 0 say nothing; the encoder behind them is broken")
    if (
        ids.dtype.kind != "U"
        or valid.dtype != bool
        or ids.shape != valid.shape
        or ids.shape != matrix.shape[:1]
    ):
        raise InputError(
            f"{path}: {ids.shape} ids, {valid.shape} valid flags and {matrix.shape} embeddings do not fit"
        )
    if len(set(ids.tolist())) != len(ids):
        raise InputError(f"{path}: a sample_id occurs twice")
    broken = valid & ~_finite_rows(matrix)
    if broken.any():
        raise InputError(f"{path}: valid rows hold NaN or inf: sample_id {listed(ids[broken].tolist())}")
    if len(meta.get("fitted_on", ())) != N_FOLDS:
        raise InputError(f"{path}: meta fitted_on must list the encoder's folds for each of {N_FOLDS} folds")


def _finite_rows(matrix: np.ndarray, rows: int = 1024) -> np.ndarray:
    """(N,) bool: no NaN or inf in the row. In pieces that stay in the cache, not by a mask of the matrix's size."""
    finite = np.empty(len(matrix), bool)
    for start in range(0, len(matrix), rows):
        finite[start : start + rows] = np.isfinite(matrix[start : start + rows]).all(axis=1)
    return finite


@dataclass
class Aligned:
    """An embedding file brought into the order of a table; rows it does not have are invalid and zero."""

    embeddings: np.ndarray
    """(N, D_in) float32"""
    valid: np.ndarray
    """(N,) bool"""
    found: int
    """rows of the table that the file has"""


def align(content: Embeddings, sample_ids: np.ndarray, path: Path | str = "embedding file") -> Aligned:
    """Join by sample_id. Raises InputError when the file has none of the ids: it belongs to another table.

    Takes `content` over: a float32 matrix whose rows are in the table's order already becomes the result, its
    invalid rows zeroed in place, without a second copy.
    """
    in_order = np.array_equal(content.sample_ids, sample_ids)
    if in_order:
        rows = np.arange(len(sample_ids))
    else:
        position = {sample_id: row for row, sample_id in enumerate(content.sample_ids.tolist())}
        rows = np.array([position.get(sample_id, -1) for sample_id in sample_ids])
    found = rows >= 0
    if not found.any():
        raise InputError(
            f"{path}: none of its {len(content.valid)} sample_ids is in this table; it was made for other rows"
        )
    valid = found & content.valid[rows]
    matrix = content.embeddings if in_order else content.embeddings.take(rows, axis=0)
    embeddings = matrix.astype(np.float32, copy=not matrix.flags.writeable)
    embeddings[~valid] = 0
    return Aligned(embeddings, valid, int(found.sum()))


def iterate_embeddings(path: Path | str) -> Iterator[Embeddings]:
    """Read an embedding file shard by shard, whichever of the two forms it has."""
    path = Path(path)
    folder = path.with_name(path.name + ".shards")
    if path.is_file() or not (folder / "index.json").is_file():
        yield read_embeddings(path)
        return
    for name in read_json(folder / "index.json")["shards"]:
        yield read_embeddings(folder / name)


def is_current(path: Path | str, meta: dict[str, Any]) -> bool:
    """Whether the file is there and was made with this meta: same rows, weights and settings, whatever the command."""
    if not (Path(path).is_file() and sidecar_of(Path(path)).is_file()):
        return False
    stored = read_json(sidecar_of(Path(path)))
    return all(stored.get(key) == value for key, value in meta.items() if key != "command")
