"""Resumable extraction: an encoder's embeddings, shard by shard, by one process or by many."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from contracts.embeddings import Embeddings, read_embeddings, write_embeddings
from contracts.errors import InputError
from contracts.files import read_json, sidecar_of, write_json


class ShardedExtraction:
    """Resumable writing of one embedding file, shard by shard.

    A shard counts as done only if its fingerprint (meta and the shard's ids) matches, so changing the model,
    its weights or the table starts that shard again. Under torchrun the processes share the shards, which are then
    of one size, at most `shard_rows`, and one or more for each process.

        extraction = ShardedExtraction(path, sample_ids, meta, shard_rows=4096)
        for rows in extraction.pending():           # rows: slice into sample_ids
            extraction.write(rows, embeddings, valid)
        if extraction.wait():                       # True in the first process
            extraction.finish()
    """

    def __init__(
        self, path: Path | str, sample_ids: np.ndarray, meta: dict[str, Any], shard_rows: int = 4096
    ):
        if shard_rows < 1:
            raise InputError(f"--shard-rows {shard_rows}: must be at least 1")
        self.path, self.meta = Path(path), meta
        self.sample_ids = np.asarray(sample_ids, np.str_)
        self.folder = self.path.with_name(self.path.name + ".shards")
        self.process, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        n_rows, self._group = len(self.sample_ids), None
        if self.processes > 1 and n_rows:
            rounds = math.ceil(n_rows / (shard_rows * self.processes))
            shard_rows = math.ceil(n_rows / (rounds * self.processes))
        starts = range(0, n_rows, shard_rows)
        self.shards = [slice(start, min(start + shard_rows, n_rows)) for start in starts]
        self.shard_rows = shard_rows

    def missing(self) -> list[slice]:
        """The shards that no process has written yet."""
        return [rows for rows in self.shards if not self._done(rows)]

    def pending(self) -> list[slice]:
        """Those of the missing shards that this process is to write."""
        missing = self.missing()
        self._barrier()  # all must see the same list before the first of them writes
        return missing[self.process :: self.processes]

    def wait(self) -> bool:
        """Wait until every process has written its shards. True in the one process that then calls `finish`."""
        self._barrier()
        if self._group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(self._group)
            self._group = None
        return self.process == 0

    def _barrier(self) -> None:
        if self.processes == 1:
            return
        import torch.distributed as dist

        if self._group is None:
            # the usual limits, 10 and 30 minutes, are shorter than a shard on a slow disk
            day = timedelta(days=1)
            if dist.is_initialized():
                self._group = dist.new_group(backend="gloo", timeout=day)
            else:
                dist.init_process_group("gloo", timeout=day)
                self._group = dist.group.WORLD
        dist.barrier(self._group)

    def write(self, rows: slice, embeddings: np.ndarray, valid: np.ndarray) -> None:
        """Store one shard: embeddings (n, D_in), valid (n,) bool."""
        (self.folder / "index.json").unlink(missing_ok=True)  # the folder is no longer what it lists
        meta = {**self.meta, "fingerprint": self._fingerprint(rows)}
        write_embeddings(self._file(rows), Embeddings(self.sample_ids[rows], embeddings, valid, meta))

    def finish(self, keep_shards: bool = False) -> None:
        """Join the shards into the one pickle, or with `keep_shards` write the index that completes the folder."""
        if missing := self.missing():
            raise InputError(f"{self.folder}: {len(missing)} of {len(self.shards)} shards are not written")
        if keep_shards:
            files = [self._file(rows).name for rows in self.shards]
            # what other --shard-rows or another number of processes left
            for other in set(self.folder.glob("[0-9]*.pkl")) - {self.folder / name for name in files}:
                sidecar_of(other).unlink(missing_ok=True)
                other.unlink()
            write_json(
                self.folder / "index.json", {**self.meta, "rows": len(self.sample_ids), "shards": files}
            )
            return
        embeddings, valid = None, np.zeros(len(self.sample_ids), bool)
        for rows in self.shards:
            shard = read_embeddings(self._file(rows))
            if embeddings is None:
                embeddings = np.empty((len(self.sample_ids), shard.width), shard.embeddings.dtype)
            embeddings[rows], valid[rows] = shard.embeddings, shard.valid
        write_embeddings(self.path, Embeddings(self.sample_ids, embeddings, valid, self.meta))
        shutil.rmtree(self.folder)

    def _file(self, rows: slice) -> Path:
        return self.folder / f"{rows.start // self.shard_rows:05d}.pkl"

    def _fingerprint(self, rows: slice) -> str:
        # the command line may differ between start and resume
        meta = {key: value for key, value in self.meta.items() if key != "command"}
        content = json.dumps([meta, self.sample_ids[rows].tolist()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _done(self, rows: slice) -> bool:
        sidecar = sidecar_of(self._file(rows))
        return sidecar.is_file() and read_json(sidecar).get("fingerprint") == self._fingerprint(rows)
