"""Weights on disk: tensors by name as safetensors, their identity, and errors that say what the disk said."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.errors import InputError
from contracts.files import sha256_file

if TYPE_CHECKING:
    import torch


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write tensors by name as safetensors, with the permissions of any other new file."""
    from safetensors.torch import save_file

    with disk_errors(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
    path.chmod(usual_mode())


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU. Raises InputError for a file that is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; train the run again") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not readable as safetensors ({error}); train the run again") from None


def weights_hash(folder: Path) -> str:
    """Identifies the trained weights below a run folder; it stands as `checkpoint` in the meta of what they make."""
    files = sorted(folder.rglob("*.safetensors"))
    lines = [f"{file.relative_to(folder).as_posix()} {sha256_file(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def usual_mode() -> int:
    """Permissions of a new file by the umask. safetensors and peft make files that only their owner can read."""
    umask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(umask)
    return 0o666 & ~umask


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise what the operating system said of a full disk, where safetensors and torch raise types of their own."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        reason = error.__context__  # of torch
        code = reason.errno if isinstance(reason, OSError) else None
        if stated := re.search(r"os error (\d+)", str(error)):  # of safetensors
            code = int(stated[1])
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from None
