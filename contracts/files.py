"""Files that are either complete or absent, and the hashes that identify them."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from contracts.errors import InputError


@contextmanager
def atomic_write(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; fsync and rename it on success, remove it on any failure.

    A process that was killed leaves its temporary file behind; the next one that writes `path` removes it.

    Raises:
        InputError: `path` is a link or a device. Renaming would put a file in its place.
        OSError: with the name of `path`.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        kind = "a symbolic link" if path.is_symlink() else "a folder" if path.is_dir() else "a device"
        raise InputError(f"{path}: this is {kind}, which a file would replace; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{_this_process()}.{secrets.token_hex(4)}.tmp")
    try:
        # newline="" keeps csv line endings as written; "x" obeys the umask, which mkstemp would not
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with open(temporary, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            # a full disk is reported by a write, which knows no name
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _this_process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _sweep(path: Path) -> None:
    """Remove temporary files of `path` whose process, on this machine, is gone."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(socket.gethostname())}-*.tmp"):
        pid = temporary.name.split(".")[-3].rsplit("-", 1)[-1]
        if pid.isdecimal() and not _is_running(int(pid)):
            temporary.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True


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
