"""Folders that are either whole or visibly not: a file COMPLETE, written last of all, holds the sha256 of the others.

It has the format of sha256sum, so a folder can be checked by hand: `cd FOLDER && sha256sum --check COMPLETE`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from contracts.errors import InputError
from contracts.files import atomic_write, sha256_file

MARKER = "COMPLETE"
RECORDS = ("*.png", "*.csv", "metrics.jsonl", "scores.json", "evaluation.json", "tensorboard", "step_*", ".*")
"""Files and folders that are no part of a model: later commands may write them again, and an export leaves them out."""


def seal(folder: Path) -> None:
    """Bring every file of a folder to the disk, and then write their hashes into its COMPLETE."""
    lines = []
    for file in _files_of(folder):
        _to_disk(file)
        lines.append(f"{sha256_file(file)}  {file.relative_to(folder).as_posix()}\n")
    with atomic_write(folder / MARKER) as marker:
        # an empty marker is that of an older version
        marker.writelines(lines or ["# no files\n"])
    _to_disk(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a sealed folder, in words; None where nothing is.

    A folder of an older version, whose COMPLETE is empty, cannot be checked; see `is_unchecked`.
    """
    for line in (folder / MARKER).read_text(encoding="utf-8").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator:
            continue
        file = folder / name
        if not file.is_file():
            return f"{file}: missing"
        if _hash_of(file) != digest:
            return f"{file}: sha256 differs from {MARKER}; the file is damaged or was changed"
    return None


def _hash_of(file: Path) -> str:
    """sha256 of a file. One that has not changed since is not read again: a program may open a folder several times."""
    status = file.stat()
    return _hash_once(file.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _hash_once(file: Path, size: int, changed: int, inode: int) -> str:
    return sha256_file(file)


def is_unchecked(folder: Path) -> bool:
    """Whether a folder was completed by an older version, which hashed nothing."""
    return (folder / MARKER).stat().st_size == 0


def require_whole(folder: Path) -> None:
    """Raise InputError for a sealed folder of which a file is missing, damaged or changed.

    Without a COMPLETE the folder is still being made, and nothing is known of its files.
    """
    if not (folder / MARKER).is_file():
        return
    if is_unchecked(folder):
        print(f"{folder}: made by an older version, which stored no hashes; it is read unchecked")
    elif found := damage(folder):
        raise InputError(f"{found}; train it again, or take the folder from a backup")


def note_change(file: Path) -> None:
    """Store the hash of a file that was changed on purpose. Where its folder is not sealed, there is nothing to do."""
    for folder in file.parents:
        marker = folder / MARKER
        if not marker.is_file():
            continue
        lines = marker.read_text(encoding="utf-8").splitlines(keepends=True)
        name = file.relative_to(folder).as_posix()
        changed = [
            f"{sha256_file(file)}  {name}\n" if line.endswith(f"  {name}\n") else line for line in lines
        ]
        with atomic_write(marker) as written:
            written.writelines(changed)
        return


def remove_sealed(folder: Path) -> None:
    """Remove a folder, its COMPLETE first: one that is half removed must not pass for a whole one."""
    (folder / MARKER).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _files_of(folder: Path) -> Iterator[Path]:
    """The files below a folder in order of their names, without records and without sealed folders inside."""
    for path in sorted(folder.iterdir()):
        if path.name == MARKER or any(fnmatch(path.name, pattern) for pattern in RECORDS):
            continue
        if path.is_file():
            yield path
        elif not (path / MARKER).exists():
            yield from _files_of(path)


def _to_disk(path: Path) -> None:
    """fsync of a file, or of a folder so that it keeps the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
