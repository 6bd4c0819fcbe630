"""Opening an embedding file: from the path to the first batch, beside a pickled list of dicts and an npz.

    python -m studies.benchmarks.embeddings_reading

Ours verifies the sha256, the ids and every number, and joins by id; the rivals verify nothing (an npz its own CRC).
The dicts are read with a restricted unpickler, as a bare pickle.load may run whatever the file says. The files are in
the page cache. Memory is the growth of the peak in a fresh process.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contracts.embeddings import Embeddings, align, read_embeddings, write_embeddings
from contracts.errors import run_entry_point
from contracts.files import sha256_file
from contracts.splits import fitted_on
from contracts.workspace import REPOSITORY
from training.settings import parse_settings

BATCH = 256


@dataclass
class EmbeddingsReadingSettings:
    rows: int = 75_000
    """rows of the file"""
    width: int = 1152
    """numbers a row"""
    rounds: int = 5
    """times that every rival is measured, in turns"""
    quick: bool = False
    """2,000 rows, one round: does it run?"""
    out: str = str(REPOSITORY / "studies" / "results" / "embeddings_reading.json")
    """json file to write"""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows, self.rounds = 2000, 1


class _RowsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("_frombuffer", "ndarray", "dtype", "_reconstruct"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def ours(folder: Path, ids: np.ndarray) -> np.ndarray:
    path = folder / "embeddings.pkl"
    return align(read_embeddings(path), ids, path).embeddings[:BATCH].copy()


def shuffled(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Ours where the table has another order than the file."""
    return ours(folder, ids[::-1])


def list_of_dicts(folder: Path, ids: np.ndarray) -> np.ndarray:
    with open(folder / "dicts.pkl", "rb") as file:
        rows = {row["sample_id"]: row["embedding"] for row in _RowsOnly(file).load()}
    return np.stack([rows[sample_id] for sample_id in ids])[:BATCH].copy()


def npz(folder: Path, ids: np.ndarray) -> np.ndarray:
    content = np.load(folder / "embeddings.npz")
    position = {sample_id: row for row, sample_id in enumerate(content["sample_ids"].tolist())}
    return content["embeddings"][[position[sample_id] for sample_id in ids]][:BATCH].copy()


def hash_alone(folder: Path, ids: np.ndarray) -> str:
    return sha256_file(folder / "embeddings.pkl")


READERS = {
    "ours": ours, "ours, another order": shuffled, "list of dicts": list_of_dicts, "npz": npz,
    "sha256 alone": hash_alone,
}  # fmt: skip


def write_files(folder: Path, ids: np.ndarray, width: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((len(ids), width), np.float32)
    meta = {
        "name": "siglip_image", "split": "train", "model": "random", "checkpoint": "none", "split_hash": "none",
        "command": "benchmark", "fitted_on": fitted_on(encoder_folds=()),
    }  # fmt: skip
    everything = Embeddings(ids.astype(str), matrix, np.ones(len(ids), bool), meta)
    write_embeddings(folder / "embeddings.pkl", everything)
    rows = [{"sample_id": sample_id, "embedding": row} for sample_id, row in zip(ids, matrix, strict=True)]
    with open(folder / "dicts.pkl", "wb") as file:
        pickle.dump(rows, file, protocol=5)
    np.savez(folder / "embeddings.npz", sample_ids=ids.astype(str), embeddings=matrix)


def peak_growth(reader: Callable[[Path, np.ndarray], object], folder: Path, ids: np.ndarray) -> int:
    """Bytes by which the peak memory of this process grows while `reader` runs."""
    before = _memory("VmRSS")
    reader(folder, ids)
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    # not getrusage: a process inherits the peak of the one that started it
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(EmbeddingsReadingSettings, argv, description=__doc__.split("\n")[0])
    from studies.benchmarks import measure

    ids = np.array([f"{row:06d}" for row in range(settings.rows)], object)  # as the prepared table gives them
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, ids, settings.width)
        works = {label: lambda reader=reader: reader(folder, ids) for label, reader in READERS.items()}
        times = measure.interleave(works, rounds=settings.rounds)
        growth = {}
        for label, reader in READERS.items():
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                growth[label] = fresh.apply(peak_growth, (reader, folder, ids))
    matrix_bytes = 4 * settings.rows * settings.width
    rows = [
        {
            "reader": label,
            "seconds": seconds["median"],
            "best_seconds": seconds["best"],
            "gigabytes_per_second": matrix_bytes / seconds["median"] / 1e9,
            "ours_is_faster_by": seconds["median"] / times["ours"]["median"],
            "peak_memory_in_matrices": growth[label] / matrix_bytes,
        }
        for label, seconds in times.items()
    ]
    measure.report(settings.out, rows)


if __name__ == "__main__":
    run_entry_point(main)
