"""The models of an out-of-fold run as one encoder of the training table: no model embeds a row that it has seen.

Each model spans a space of its own, so its embeddings are turned into the space of the model of all rows, which embeds
every other table (`training.alignment`). A rotation without a shift keeps their unit length.

N rows of the training table, B batch, S side of a picture in pixels, D_in width of the joint image-text space.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_finetune.config import ClipSettings
from clip_finetune.encoder import Encoder
from contracts.splits import N_FOLDS, fitted_out_of_fold, roles
from training.alignment import Alignment, alignment_rows
from training.pictures import PictureRows
from training.run_folder import RunFolder, part_folder

if TYPE_CHECKING:
    import pandas as pd
    import torch


class OutOfFoldEncoder:
    """Embeds each training row by the model of its hold-out, and prices it by the head of that model.

    Args:
        run_folder: of a finished run with --folds.
        table: the training table with its column `fold`.
        images: folder of the pictures.
        options: of `Encoder.open`: name, device, precision, batch_size, workers.

    Raises:
        InputError: there is no finished run in this folder, or no such device.
    """

    def __init__(self, run_folder: Path, table: pd.DataFrame, images: Path, **options: Any):
        run = RunFolder.finished(run_folder, "clip_finetune")
        self.settings = run.settings(ClipSettings)
        self.table = table
        self.images = images
        self.whole = Encoder.open(run_folder, **options)
        self.parts: list[Encoder] = []
        """the model of each hold-out"""
        for holdout in range(self.settings.folds):
            self.parts.append(Encoder.open(run_folder / part_folder(holdout), **options))
        self.meta = {
            **self.whole.meta,
            "aligned": True,
            "fitted_on": fitted_out_of_fold(self.settings.folds),
        }
        self.width = self.whole.width
        self.device = self.whole.device
        self.batch_size = self.whole.batch_size
        self.workers = self.whole.workers
        self._alignments: list[Alignment] | None = None

    def rows(self) -> PicturesWithHoldout:
        """The training rows as inputs of this encoder."""
        model = self.whole.model
        holdout = self._holdout_of(self.table["fold"].to_numpy())
        names = self.table["image"]
        return PicturesWithHoldout(holdout, names, self.images, model.transform(), min_side=model.side)

    def encode_batch(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
        """Embeddings (B, D_in) float32 of unit length, of pictures (B, 3, S, S) and their hold-outs (B,)."""
        pictures, holdouts = inputs
        embeddings = np.empty((len(pictures), self.width), np.float32)
        for holdout in holdouts.unique().tolist():
            unseen = holdouts == holdout
            embedded = self.parts[holdout].encode_batch(pictures[unseen])
            embeddings[unseen.numpy()] = self.alignments[holdout](embedded)
        return embeddings

    @property
    def can_price(self) -> bool:
        """Whether every model has a price head that was fitted."""
        return all(part.can_price for part in self.parts)

    def log_price(self, embeddings: np.ndarray, fold: np.ndarray) -> np.ndarray:
        """log1p(price), (n,) float64, of embeddings (n, D_in) of rows in these folds (n,)."""
        log_price = np.empty(len(embeddings))
        holdouts = self._holdout_of(fold)
        for holdout in np.unique(holdouts):
            unseen = holdouts == holdout
            # the head knows the space of its own model only
            own = self.alignments[holdout].inverse(embeddings[unseen]).astype(np.float32)
            log_price[unseen] = self.parts[holdout].log_price(own)
        return log_price

    @property
    def alignments(self) -> list[Alignment]:
        """One for each hold-out. They are fitted once, when they are first needed."""
        if self._alignments is None:
            random = np.random.default_rng(self.settings.seed)
            self._alignments = [self._fit_alignment(holdout, random) for holdout in range(len(self.parts))]
        return self._alignments

    def _fit_alignment(self, holdout: int, random: np.random.Generator) -> Alignment:
        part = roles(holdout, self.settings.folds)
        sample = self.table.iloc[alignment_rows(self.table["fold"].to_numpy(), part, random)]
        source = self.parts[holdout].encode(sample, self.images)
        target = self.whole.encode(sample, self.images)
        usable = source.valid & target.valid
        return Alignment.fit(source.embeddings[usable], target.embeddings[usable], shift=False)

    def _holdout_of(self, fold: np.ndarray) -> np.ndarray:
        """(n,) the hold-out that validates each fold: that model has not seen the row."""
        folds_per_holdout = N_FOLDS // self.settings.folds
        return fold // folds_per_holdout


class PicturesWithHoldout(PictureRows):
    """Pictures whose input also says which hold-out the row belongs to.

    Args:
        holdout: (N,) int.
        pictures, options: of PictureRows.
    """

    def __init__(self, holdout: np.ndarray, *pictures: Any, **options: Any):
        super().__init__(*pictures, **options)
        self.holdout = holdout.tolist()

    def __getitem__(self, row: int) -> tuple[Any | None, str]:
        picture, reason = super().__getitem__(row)
        return (None if picture is None else (picture, self.holdout[row])), reason
