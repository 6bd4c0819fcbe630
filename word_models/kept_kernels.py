"""Kernels that several models share: what one has fitted, the next one reads.

`boosted` and `mlp_on_kernel` begin with the same kernel, and fitting it takes most of their time. With --keep-kernels,
whichever is fitted first leaves it in checkpoints/kernels/, and the other reads it there. The name of a file is a hash
of all that the kernel depends on, so another row, price, setting or version of this program never meets an old file.
The fitted rows are not stored, because the model that asks has them. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from contracts.files import atomic_write
from contracts.workspace import Workspace
from word_models.compared import ComparedRows
from word_models.config import WordModelSettings
from word_models.features import Features
from word_models.kernel import KernelModel, read_arrays

SOURCES = ("kernel", "similarity", "compared", "neighbourhoods", "surroundings", "loss")
"""The modules whose code a fitted kernel depends on."""


def fit_or_read(settings: WordModelSettings, rows: Features, ln_price: np.ndarray) -> KernelModel:
    """The kernel of n rows with ln_price (n,): read if `settings.keep_kernels` and it was fitted before, else fitted.

    Raises:
        InputError: the file of a kept kernel is damaged.
    """
    if not settings.keep_kernels:
        return KernelModel.fit(settings, rows, ln_price)
    compared = ComparedRows.of(rows)
    folder = Workspace(settings.workspace).path("run", name="kernels")
    path = folder / f"{_key(settings, compared, ln_price)}.npz"
    if path.is_file():
        return KernelModel.from_arrays(read_arrays(path), compared)
    model = KernelModel.fit(settings, rows, ln_price)
    with atomic_write(path, "wb") as file:
        np.savez(file, allow_pickle=False, **model.arrays())
    return model


def _key(settings: WordModelSettings, compared: ComparedRows, ln_price: np.ndarray) -> str:
    """A hash of the program, the settings, and what is known of the rows."""
    digest = hashlib.sha256()
    for module in SOURCES:
        digest.update((Path(__file__).parent / f"{module}.py").read_bytes())
    digest.update(repr((settings.kernel_steps, settings.seed, list(compared.amounts))).encode())
    for name, array in (compared.arrays() | {"ln_price": ln_price}).items():
        digest.update(repr((name, array.dtype, array.shape)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
