"""Opening an embedding file, from the path to the first batch, beside a pickled list of dicts and an npz.

    python -m studies.benchmarks.embeddings_reading

Our reader verifies the sha256, the ids and every number, and joins the rows by id. The rivals verify nothing, except
that an npz has a CRC of its own. The dicts are read with a restricted unpickler, as a bare pickle.load may run whatever
a file says. The files are in the page cache. Memory is the growth of the peak in a fresh process.
"""

from __future__ import annotations

import functools
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
from contracts.workspace import SIGLIP_IMAGE
from studies.benchmarks.memory import seconds_and_peak
from studies.tables import RESULTS
from training.settings import parse_settings

BATCH = 256


@dataclass
class EmbeddingsReadingSettings:
    rows: int = 75_000
    """Rows of the file."""
    width: int = 1152
    """Numbers per row."""
    rounds: int = 5
    """Times that every reader is measured, in turns."""
    quick: bool = False
    """Use 2,000 rows and one round, to see that it runs."""
    out: Path = RESULTS / "embeddings_reading.json"
    """Json file to write."""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows = 2000
            self.rounds = 1


# Each reader takes the folder of the files and the ids of the table, and returns the embeddings (BATCH, D_in) of its
# first rows.


def ours(folder: Path, ids: np.ndarray) -> np.ndarray:
    path = folder / "embeddings.pkl"
    return align(read_embeddings(path), ids, path).embeddings[:BATCH].copy()


def shuffled(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Ours for a table whose order is not that of the file."""
    return ours(folder, ids[::-1])


class _RowsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("_frombuffer", "ndarray", "dtype", "_reconstruct"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def list_of_dicts(folder: Path, ids: np.ndarray) -> np.ndarray:
    with open(folder / "dicts.pkl", "rb") as file:
        rows = _RowsOnly(file).load()
    by_id = {row["sample_id"]: row["embedding"] for row in rows}
    in_order = np.stack([by_id[sample_id] for sample_id in ids])
    return in_order[:BATCH].copy()


def npz(folder: Path, ids: np.ndarray) -> np.ndarray:
    content = np.load(folder / "embeddings.npz")
    position = {sample_id: row for row, sample_id in enumerate(content["sample_ids"].tolist())}
    in_order = content["embeddings"][[position[sample_id] for sample_id in ids]]
    return in_order[:BATCH].copy()


def hash_alone(folder: Path, ids: np.ndarray) -> str:
    """What verifying the sha256 costs; it reads nothing."""
    return sha256_file(folder / "embeddings.pkl")


READERS: dict[str, Callable[[Path, np.ndarray], object]] = {
    "ours": ours,
    "ours, another order": shuffled,
    "list of dicts": list_of_dicts,
    "npz": npz,
    "sha256 alone": hash_alone,
}


def write_files(folder: Path, ids: np.ndarray, width: int) -> None:
    """The same random embeddings in every format."""
    matrix = np.random.default_rng(0).standard_normal((len(ids), width), np.float32)
    meta = {
        "name": SIGLIP_IMAGE, "split": "train", "model": "random", "checkpoint": "none", "split_hash": "none",
        "command": "benchmark", "fitted_on": fitted_on(encoder_folds=()),
    }  # fmt: skip
    everything_valid = np.ones(len(ids), bool)
    write_embeddings(folder / "embeddings.pkl", Embeddings(ids.astype(str), matrix, everything_valid, meta))
    rows = [{"sample_id": sample_id, "embedding": row} for sample_id, row in zip(ids, matrix, strict=True)]
    with open(folder / "dicts.pkl", "wb") as file:
        pickle.dump(rows, file, protocol=5)
    np.savez(folder / "embeddings.npz", sample_ids=ids.astype(str), embeddings=matrix)


def peak_growth(reader: Callable[[Path, np.ndarray], object], folder: Path, ids: np.ndarray) -> int:
    """Bytes by which the peak memory of this process grows while `reader` runs."""
    return seconds_and_peak(lambda: reader(folder, ids))[1]


def peak_growth_in_fresh_process(
    reader: Callable[[Path, np.ndarray], object], folder: Path, ids: np.ndarray
) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(peak_growth, (reader, folder, ids))


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(EmbeddingsReadingSettings, argv, description=__doc__.split("\n")[0])
    from studies.benchmarks import measure

    ids = np.array([f"{row:06d}" for row in range(settings.rows)], object)  # as the prepared table gives them
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, ids, settings.width)
        works = {label: functools.partial(reader, folder, ids) for label, reader in READERS.items()}
        times = measure.interleave(works, rounds=settings.rounds)
        peaks = {
            label: peak_growth_in_fresh_process(reader, folder, ids) for label, reader in READERS.items()
        }

    matrix_bytes = np.dtype(np.float32).itemsize * settings.rows * settings.width
    rows = []
    for label, seconds in times.items():
        rows.append(
            {
                "reader": label,
                "seconds": seconds["median"],
                "best_seconds": seconds["best"],
                "gigabytes_per_second": matrix_bytes / seconds["median"] / 1e9,
                "ours_is_faster_by": seconds["median"] / times["ours"]["median"],
                "peak_memory_in_matrices": peaks[label] / matrix_bytes,
            }
        )
    measure.report(settings.out, rows)


if __name__ == "__main__":
    run_entry_point(main)
