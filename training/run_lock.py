"""One training per run folder: a second one would mix its checkpoints with those of the first.

The lock belongs to the process, so the operating system releases it however the process ends. Processes that it has
forked do not keep it (as they would with flock). On a network file system it holds where the server supports locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from contracts.errors import InputError

_held: dict[Path, IO[str]] = {}


def lock_run(folder: Path) -> None:
    """Keep other processes from training into `folder` until `release_run` or the end of this process.

    Raises:
        InputError: another process trains into it; the message says which, where and since when.
    """
    path = _lock_file(folder)
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # it stays open as long as the lock is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _described(file)
            file.close()
            raise InputError(
                f"{folder}: {holder} trains into this folder; wait until it ends, or choose another name with --run"
            ) from None
        # the holder before may have removed the file between our opening and our locking it
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    content = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    json.dump(content, file)
    file.flush()
    _held[path] = file


def release_run(folder: Path) -> None:
    """Let others train into `folder`; nothing happens where this process does not hold its lock."""
    path = _lock_file(folder)
    if file := _held.pop(path, None):
        path.unlink(missing_ok=True)
        file.close()


def has_lock_file(folder: Path) -> bool:
    """Whether a process holds the lock, or was killed while it did."""
    return _lock_file(folder).exists()


def _lock_file(folder: Path) -> Path:
    # beside the folder, which may be renamed or removed while the lock is held
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def _described(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}, started {holder['since']},"
    except (ValueError, KeyError, TypeError):
        return "another process"  # it has not written its name yet
