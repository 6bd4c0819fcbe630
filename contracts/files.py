"""Files that are either complete or absent, and the hashes that identify them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from contracts.errors import InputError


@contextmanager
def atomic_write(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; fsync and rename it on success, remove it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        # newline="" keeps csv line endings as written
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        os.close(handle)
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sidecar_of(path: Path | str) -> Path:
    """The json file beside a data file that says where its content comes from and holds its sha256."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def write_json(path: Path | str, content: object) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file. Raises InputError naming the file when it is absent or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def read_versioned(path: Path | str, schema: int, remedy: str) -> Any:
    """Read a JSON file that says in `schema` how it is laid out. Raises InputError for a file of another version.

    Args:
        schema: the version that this program reads.
        remedy: what the user can do, such as "train it again".
    """
    content = read_json(path)
    if content.get("schema") != schema:
        raise InputError(f"{path}: schema {content.get('schema')!r}, this version reads {schema}; {remedy}")
    return content


def sha256_file(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
