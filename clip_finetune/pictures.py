"""Pictures with their texts and prices: which rows are usable, their roles, and the order they are read in.

N catalogue rows, B batch, S side of a picture in pixels, T tokens.
"""

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
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from clip_finetune.config import ClipSettings
from contracts.errors import InputError
from contracts.splits import Roles
from training.pictures import PictureRows

CHARACTERS = 2000  # CLIP reads 77 tokens at most; cleaning the rest of a long text would only cost time
SMALLEST_SIDE = 64  # pixels; the smallest scale is enough to see whether a picture can be decoded


class TrainingRows:
    """Rows of the training table: a map-style dataset for torch's DataLoader.

    Item `row` is ({picture (3, S, S) float32, tokens (T,) int64, log_price float32}, "") or, where the picture cannot
    be used, (None, reason).
    """

    def __init__(self, table: pd.DataFrame, pictures: PictureRows, tokenizer: Callable[[list[str]], Tensor]):
        self.pictures = pictures
        self.tokenizer = tokenizer
        self.texts = table["text"].str.slice(0, CHARACTERS).tolist()
        self.log_price = np.log1p(table["price"]).to_numpy(np.float32)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> tuple[dict[str, object] | None, str]:
        picture, reason = self.pictures[row]
        if reason:
            return None, reason
        tokens = self.tokenizer([self.texts[row]])[0]
        return {"picture": picture, "tokens": tokens, "log_price": self.log_price[row]}, ""


@dataclass
class Data:
    """The training table and the positions in it by role; only rows with a usable picture have a role."""

    table: pd.DataFrame
    rows: TrainingRows
    fit: np.ndarray
    stop: np.ndarray
    validate: np.ndarray

    @classmethod
    def by_role(cls, table: pd.DataFrame, rows: TrainingRows, usable: np.ndarray, role: Roles) -> Data:
        """Deal the rows by the column `fold` of `table`; `usable` is (N,) bool."""

        def of(folds: tuple[int, ...]) -> np.ndarray:
            return np.flatnonzero(usable & table["fold"].isin(folds).to_numpy())

        return cls(table, rows, of(role.fit), of(role.stop), of(role.validate))


def reasons_unusable(names: Sequence[str], folder: Path, workers: int, *, quiet: bool = False) -> list[str]:
    """Why each picture cannot be used, "" for one that can.

    Every picture is decoded, because a header says nothing about the rest of the file.
    """
    pictures = PictureRows(names, folder, _decoded, min_side=SMALLEST_SIDE)
    loader = DataLoader(pictures, batch_size=64, num_workers=workers, collate_fn=pictures.collate)
    reasons = []
    with tqdm(total=len(pictures), desc="checking pictures", unit="picture", disable=quiet) as progress:
        for _, reasons_of_batch in loader:
            reasons += reasons_of_batch
            progress.update(len(reasons_of_batch))
    return reasons


def _decoded(picture: Image.Image) -> bool:
    """Stands for the picture, of which only the reason matters."""
    return True


def split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def load_batches(
    rows: TrainingRows, batches: Sequence[np.ndarray], workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield picture (B, 3, S, S), tokens (B, T) and log_price (B,) of the given batches of positions, in that order.

    Raises:
        InputError: a picture was usable when the run started and no longer is.
    """
    loader = DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=PictureRows.collate,
        num_workers=min(workers, len(batches)),
        pin_memory=device.type == "cuda",
    )
    for batch, (inputs, reasons) in zip(batches, loader, strict=True):
        for row, reason in zip(batch, reasons, strict=True):
            if reason:
                name = rows.pictures.names[row]
                raise InputError(
                    f"{name}: the picture became unusable during the run ({reason}); repair it and --resume"
                )
        yield inputs


def epoch_steps(rows: np.ndarray, settings: ClipSettings, epoch: int, processes: int) -> list[np.ndarray]:
    """The rows of each step of one epoch, for all processes together; depends on nothing but the arguments.

    All steps have nearly the same size, so that the last one is not a small one with few negatives. Up to
    processes - 1 rows per step are left out, because every process needs as many rows as the others.
    """
    order = np.random.default_rng([settings.seed, epoch]).permutation(rows)
    pairs_per_step = settings.batch_size * settings.gradient_accumulation_steps * processes
    count = math.ceil(len(rows) / pairs_per_step)
    steps = [step[: len(step) // processes * processes] for step in np.array_split(order, count)]
    return [step for step in steps if len(step)]


def load_steps(
    data: Data, steps: Sequence[np.ndarray], settings: ClipSettings, accelerator: Accelerator
) -> Iterator[list[dict[str, Tensor]]]:
    """Yield the micro-batches of this process for each step."""
    own = [step[accelerator.process_index :: accelerator.num_processes] for step in steps]
    batches_of_steps = [split(rows, settings.batch_size) for rows in own]
    in_order = [batch for batches in batches_of_steps for batch in batches]
    loaded = load_batches(data.rows, in_order, settings.workers, accelerator.device)
    for batches in batches_of_steps:
        yield [next(loaded) for _ in batches]
