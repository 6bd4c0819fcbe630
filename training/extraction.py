"""Extraction of embeddings: one loop over shards for every encoder, and files on disk that make it resumable.

A stage brings rows (a dataset of model inputs, such as `training.pictures.PictureRows`) and an encoder. `encode_table`
embeds a table in memory. A command, which must survive an interruption, goes through files:

    extraction = ShardedExtraction(path, sample_ids, meta, shard_rows=4096)
    for shard in embed_shards(extraction.pending(), rows, [encoder], batch_size=64, workers=8, device=device):
        extraction.write(shard.rows, shard.embeddings[0], shard.valid, shard.reasons)
    if extraction.wait():                       # True in the first process
        failures = extraction.failures()
        extraction.finish()
        print_failures("clip_image", failures)

N catalogue rows, B batch, D_in encoder width.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from contracts.embeddings import Embeddings, read_embeddings, write_embeddings
from contracts.errors import InputError
from contracts.files import atomic_write, read_json, sidecar_of, write_json
from contracts.splits import split_hash
from contracts.tables import without_formulas

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from contracts.workspace import Workspace


class InputRows(Protocol):
    """The rows of a table as model inputs: a map-style dataset that also knows how to make a batch of its items."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...

    def collate(self, items: list[Any]) -> tuple[Any | None, list[str]]:
        """The inputs of the usable rows of a batch (None if there are none), and for every row a reason or ""."""

    def identity(self) -> str:
        """A hash that changes when an input changes."""


class BatchEncoder(Protocol):
    """A model on its device. The `Encoder` of each stage that embeds pictures or texts row by row is one."""

    width: int
    """D_in"""

    def encode_batch(self, inputs: Any) -> np.ndarray:
        """Embeddings (B, D_in) float32 of the inputs that `InputRows.collate` made."""


@dataclass
class EmbeddedShard:
    """The embeddings of one shard of n rows."""

    rows: slice
    """which rows of the table"""
    embeddings: list[np.ndarray]
    """(n, D_in) float32 of each encoder, zero in rows without an input"""
    reasons: list[str]
    """n reasons why a row has no embedding, "" for a row that has one"""

    @property
    def valid(self) -> np.ndarray:
        """(n,) bool"""
        return np.array([reason == "" for reason in self.reasons], bool)


def embed_shards(
    shards: Sequence[slice],
    rows: InputRows,
    encoders: Sequence[BatchEncoder],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    description: str = "",
    quiet: bool = False,
) -> Iterator[EmbeddedShard]:
    """Encode the given shards, one after the other.

    Args:
        rows: with several encoders, its inputs are a sequence with one entry for each.
        batch_size: rows per forward pass. A batch never crosses the border of a shard, so the number of processes that
            share the shards changes no batch.
        workers: processes that read and prepare the rows; 0 does it in this process.
        device: where the encoders are.
        description: label of the progress bar.
        quiet: show no progress bar.
    """
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    batches_of_shards = [_batches(shard, batch_size) for shard in shards]
    batches: list[Any] = list(chain.from_iterable(batches_of_shards))
    # one loader over all shards keeps its workers busy across the borders
    loader: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]  # torch takes any rows with a length and items, but declares its own class
        batch_sampler=batches,
        collate_fn=rows.collate,
        num_workers=min(workers, len(batches)),
        pin_memory=device.type == "cuda",
    )
    prepared = iter(loader)
    total = sum(map(len, batches))
    with tqdm(total=total, desc=description, unit="row", mininterval=1, disable=quiet) as progress:
        for shard, own_batches in zip(shards, batches_of_shards, strict=True):
            n_rows = shard.stop - shard.start
            embeddings = [np.zeros((n_rows, encoder.width), np.float32) for encoder in encoders]
            reasons: list[str] = []
            for inputs, reasons_of_batch in islice(prepared, len(own_batches)):
                usable = _usable(reasons_of_batch, first=len(reasons))
                if usable:
                    inputs_of_encoders = [inputs] if len(encoders) == 1 else inputs
                    for number, encoder in enumerate(encoders):
                        embeddings[number][usable] = encoder.encode_batch(inputs_of_encoders[number])
                reasons += reasons_of_batch
                progress.update(len(reasons_of_batch))
            yield EmbeddedShard(shard, embeddings, reasons)


def _batches(shard: slice, batch_size: int) -> list[range]:
    starts = range(shard.start, shard.stop, batch_size)
    return [range(start, min(start + batch_size, shard.stop)) for start in starts]


def _usable(reasons: list[str], *, first: int) -> list[int]:
    """Positions of the rows without a reason, counted from `first`."""
    return [first + row for row, reason in enumerate(reasons) if reason == ""]


def encode_table(
    sample_ids: np.ndarray,
    rows: InputRows,
    encoder: BatchEncoder,
    *,
    meta: dict[str, Any],
    batch_size: int,
    workers: int,
    device: torch.device,
) -> tuple[Embeddings, dict[str, str]]:
    """Embed the rows of a table in memory.

    Args:
        sample_ids: (N,) str.
        meta: of the embeddings.
        batch_size, workers, device: as in `embed_shards`.

    Returns:
        The embeddings (N, D_in), and why rows have none: sample_id to reason.
    """
    whole = slice(0, len(rows))
    (shard,) = embed_shards(
        [whole], rows, [encoder], batch_size=batch_size, workers=workers, device=device, quiet=True
    )
    ids = np.asarray(sample_ids, np.str_)
    return Embeddings(ids, shard.embeddings[0], shard.valid, dict(meta)), _reasons_by_id(ids, shard.reasons)


def _reasons_by_id(sample_ids: np.ndarray, reasons: Sequence[str]) -> dict[str, str]:
    """sample_id to reason, of the rows that have one."""
    pairs = zip(sample_ids.tolist(), reasons, strict=True)
    return {sample_id: reason for sample_id, reason in pairs if reason}


def file_meta(encoder_meta: dict[str, Any], workspace: Workspace, split: str, inputs: str) -> dict[str, Any]:
    """Meta of the embedding file of one table: what the encoder says of itself, and what the table adds.

    A shard that was written under another meta (apart from `command`) is made again.

    Args:
        split: name of the table.
        inputs: identity of its rows, see `InputRows.identity`.
    """
    return {
        **encoder_meta,
        "split": split,
        "inputs": inputs,
        "split_hash": split_hash(workspace.folds()),
        "command": " ".join(sys.argv),
    }


class ShardedExtraction:
    """The shards of one embedding file on disk: which are missing, writing them, joining them.

    A shard counts as done only if its fingerprint (meta and the shard's ids) matches, so a change of the model, its
    weights or the table starts that shard again. Under torchrun the processes share the shards. The size of a shard,
    at most `shard_rows`, is then chosen so that every process gets as many rows as the others.

    Args:
        path: the embedding file; the shards lie in the folder `<path>.shards` beside it.
        sample_ids: (N,) str, the rows of the table in order.
        meta: of the embedding file, see `contracts.embeddings.REQUIRED_META`.
        shard_rows: rows per shard.
        barrier: waits until every process has called it; None waits through torch.distributed. A test in which
            several processes take turns inside one passes a function that returns at once.
    """

    def __init__(
        self,
        path: Path | str,
        sample_ids: np.ndarray,
        meta: dict[str, Any],
        shard_rows: int = 4096,
        *,
        barrier: Callable[[], None] | None = None,
    ):
        if shard_rows < 1:
            raise InputError(f"--shard-rows {shard_rows}: must be at least 1")
        self.path = Path(path)
        self.folder = self.path.with_name(self.path.name + ".shards")
        self.meta = meta
        self.sample_ids = np.asarray(sample_ids, np.str_)
        self.process = int(os.environ.get("RANK", 0))
        self.processes = int(os.environ.get("WORLD_SIZE", 1))
        self._barrier = barrier or self._wait_for_processes
        self._group: Any = None

        n_rows = len(self.sample_ids)
        if self.processes > 1 and n_rows:
            rounds = math.ceil(n_rows / (shard_rows * self.processes))
            shard_rows = math.ceil(n_rows / (rounds * self.processes))
        self.shard_rows = shard_rows
        starts = range(0, n_rows, shard_rows)
        self.shards = [slice(start, min(start + shard_rows, n_rows)) for start in starts]

    def missing(self) -> list[slice]:
        """The shards that no process has written yet."""
        return [rows for rows in self.shards if not self._done(rows)]

    def pending(self) -> list[slice]:
        """The missing shards that this process has to write."""
        missing = self.missing()
        self._barrier()  # all processes must see the same list before the first of them writes
        return missing[self.process :: self.processes]

    def write(
        self, rows: slice, embeddings: np.ndarray, valid: np.ndarray, reasons: Sequence[str] | None = None
    ) -> None:
        """Store one shard of n rows.

        Args:
            embeddings: (n, D_in) float32 or float16.
            valid: (n,) bool.
            reasons: why each row has no embedding, "" for a row that has one; `failures` returns them later.
        """
        (self.folder / "index.json").unlink(missing_ok=True)  # the folder no longer holds what it lists
        ids = self.sample_ids[rows]
        failures = _reasons_by_id(ids, reasons or [""] * len(ids))
        meta = {**self.meta, "fingerprint": self._fingerprint(rows), "failures": failures}
        write_embeddings(self._file(rows), Embeddings(ids, embeddings, valid, meta))

    def wait(self) -> bool:
        """Wait until every process has written its shards. True in the one process that then calls `finish`."""
        self._barrier()
        if self._group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(self._group)
            self._group = None
        return self.process == 0

    def failures(self) -> dict[str, str]:
        """Why rows have no embedding: sample_id to reason, in the order of the table. Call it before `finish`."""
        failures: dict[str, str] = {}
        for rows in self.shards:
            failures |= read_json(sidecar_of(self._file(rows)))["failures"]
        return failures

    def finish(self, keep_shards: bool = False) -> None:
        """Join the shards into one file and remove them, or with `keep_shards` write the index of the folder."""
        if missing := self.missing():
            raise InputError(f"{self.folder}: {len(missing)} of {len(self.shards)} shards are not written")
        if keep_shards:
            self._write_index()
        else:
            self._join()
            shutil.rmtree(self.folder)

    def _write_index(self) -> None:
        files = [self._file(rows) for rows in self.shards]
        # an earlier run with another --shard-rows or number of processes leaves shards that belong to no row now
        for other in set(self.folder.glob("[0-9]*.pkl")) - set(files):
            sidecar_of(other).unlink(missing_ok=True)
            other.unlink()
        index = {**self.meta, "rows": len(self.sample_ids), "shards": [file.name for file in files]}
        write_json(self.folder / "index.json", index)

    def _join(self) -> None:
        embeddings = None
        valid = np.zeros(len(self.sample_ids), bool)
        for rows in self.shards:
            shard = read_embeddings(self._file(rows))
            if embeddings is None:
                embeddings = np.empty((len(self.sample_ids), shard.width), shard.embeddings.dtype)
            embeddings[rows] = shard.embeddings
            valid[rows] = shard.valid
        assert embeddings is not None, "a table has at least one shard"
        write_embeddings(self.path, Embeddings(self.sample_ids, embeddings, valid, self.meta))

    def _file(self, rows: slice) -> Path:
        return self.folder / f"{rows.start // self.shard_rows:05d}.pkl"

    def _fingerprint(self, rows: slice) -> str:
        # the command line may differ between start and resume
        meta = {key: value for key, value in self.meta.items() if key != "command"}
        content = json.dumps([meta, self.sample_ids[rows].tolist()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _done(self, rows: slice) -> bool:
        sidecar = sidecar_of(self._file(rows))
        if not sidecar.is_file():
            return False
        stored = read_json(sidecar)
        # shards of older versions do not say why a row has no embedding, so they are made again
        return stored.get("fingerprint") == self._fingerprint(rows) and "failures" in stored

    def _wait_for_processes(self) -> None:
        if self.processes == 1:
            return
        import torch.distributed as dist

        if self._group is None:
            # torch's own limits, 10 and 30 minutes, are shorter than a shard on a slow disk
            day = timedelta(days=1)
            if dist.is_initialized():
                self._group = dist.new_group(backend="gloo", timeout=day)
            else:
                dist.init_process_group("gloo", timeout=day)
                self._group = dist.group.WORLD
        dist.barrier(self._group)


def write_picture_failures(path: Path, table: pd.DataFrame, failures: dict[str, str]) -> None:
    """Write the csv sample_id, image, reason of the rows in `failures` (sample_id to reason), in the table's order."""
    failed = table.loc[table["sample_id"].isin(list(failures)), ["sample_id", "image"]]
    failed = failed.assign(reason=failed["sample_id"].map(failures))
    with atomic_write(path) as file:
        without_formulas(failed).to_csv(file, index=False, lineterminator="\n")


def print_failures(name: str, failures: dict[str, str]) -> None:
    """Print how many rows have no embedding, counted by reason."""
    if not failures:
        return
    # what follows in brackets, such as the decoder's message, is of one picture only
    counts = Counter(reason.split(" (")[0] for reason in failures.values())
    listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    print(f"{name}: {len(failures)} rows without an embedding: {listed}")
