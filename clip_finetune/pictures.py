"""Catalogue rows as model inputs: which have a usable picture, their roles, and the order they are read in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clip_finetune.config import ClipSettings
from contracts.errors import InputError
from contracts.splits import Roles
from contracts.workspace import Workspace
from training.pictures import UnreadablePicture, open_picture

CHARACTERS = 2000  # CLIP reads 77 tokens at most; cleaning the rest of a long text only costs time


class CatalogRows(Dataset):
    """Rows of a prepared table by position.

    Each item is a dict: row int, picture (3, S, S) float32, valid bool (False: no usable picture, zeros) and,
    given a tokenizer, tokens (T,) int64 and log_price float32.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        folder: Path,
        transform: Callable,
        side: int,
        tokenizer: Callable | None = None,
    ):
        self.paths, self.tokenizer = picture_paths(table, folder), tokenizer
        self.transform, self.side = transform, side
        self.texts = table["text"].str.slice(0, CHARACTERS).tolist()
        self.log_price = np.log1p(table["price"]).to_numpy(np.float32) if "price" in table else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> dict[str, object]:
        item = {"row": row}
        try:
            item |= {"picture": self.transform(_open(self.paths[row], self.side)), "valid": True}
        except UnreadablePicture:  # the caller reports the reason with `reasons_unusable`
            item |= {"picture": torch.zeros(3, self.side, self.side), "valid": False}
        if self.tokenizer is not None:
            item |= {"tokens": self.tokenizer([self.texts[row]])[0], "log_price": self.log_price[row]}
        return item


class _Reasons(Dataset):
    def __init__(self, paths: Sequence[Path | None]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> str:
        try:
            _open(self.paths[row], min_side=64)
        except UnreadablePicture as error:
            return str(error)
        return ""


def picture_paths(table: pd.DataFrame, folder: Path) -> list[Path | None]:
    return [folder / name if name else None for name in table["image"]]


def reasons_unusable(paths: Sequence[Path | None], workers: int, *, quiet: bool = False) -> list[str]:
    """Why each picture cannot be used, "" for one that can.

    Every picture is decoded, because a header says nothing about the rest of the file.
    """
    reasons = []
    loader = DataLoader(_Reasons(paths), batch_size=64, num_workers=workers, collate_fn=list)
    with tqdm(total=len(paths), desc="checking pictures", unit="picture", disable=quiet) as progress:
        for batch in loader:
            reasons += batch
            progress.update(len(batch))
    return reasons


def _open(path: Path | None, min_side: int) -> Image.Image:
    if path is None:
        raise UnreadablePicture("no picture named")
    return open_picture(path, min_side=min_side)


@dataclass
class Data:
    """Training table and the positions in it by role; only rows with a usable picture have a role."""

    table: pd.DataFrame
    rows: CatalogRows
    fit: np.ndarray
    stop: np.ndarray
    validate: np.ndarray

    @classmethod
    def by_role(
        cls, table: pd.DataFrame, rows: CatalogRows, usable: np.ndarray, fold: np.ndarray, role: Roles
    ):
        """`usable` (N,) bool and `fold` (N,) int in the order of `table`."""
        return cls(
            table,
            rows,
            *(np.flatnonzero(usable & np.isin(fold, f)) for f in (role.fit, role.stop, role.validate)),
        )


def fold_of_each_row(workspace: Workspace, table: pd.DataFrame) -> np.ndarray:
    """(N,) int. Raises InputError when the fold file is of another table."""
    fold = workspace.folds().reindex(table["sample_id"])
    if fold.isna().any():
        first = fold.index[fold.isna()][0]
        raise InputError(f"{workspace.path('folds')}: no fold for sample_id {first}; run data.prepare again")
    return fold.to_numpy(int)


def split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def load_batches(
    rows: Dataset, batches: Sequence[Sequence[int]], workers: int, device: torch.device
) -> DataLoader:
    """Items of the given batches of positions, in that order."""
    workers = min(workers, len(batches))
    return DataLoader(rows, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda")


def epoch_steps(rows: np.ndarray, settings: ClipSettings, epoch: int, processes: int) -> list[np.ndarray]:
    """The rows of each step of one epoch, for all processes together; depends on nothing but the arguments.

    Steps are of nearly one size, so there is no small last one with few negatives. Up to processes - 1 rows a
    step are left out, because every process needs as many as the others.
    """
    order = np.random.default_rng([settings.seed, epoch]).permutation(rows)
    count = math.ceil(len(rows) / (settings.batch_size * settings.grad_accum * processes))
    steps = [step[: len(step) // processes * processes] for step in np.array_split(order, count)]
    return [step for step in steps if len(step)]


def load_steps(
    data: Data, steps: Sequence[np.ndarray], settings: ClipSettings, accelerator: Accelerator
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yield this process's batches of each step."""
    own = [step[accelerator.process_index :: accelerator.num_processes] for step in steps]
    batches = [split(rows, settings.batch_size) for rows in own]
    in_order = [batch for step in batches for batch in step]
    loaded = iter(load_batches(data.rows, in_order, settings.workers, accelerator.device))
    for step in batches:
        yield [next(loaded) for _ in step]
