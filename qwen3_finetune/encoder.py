"""The text encoder of a finished run as an encoder of tables, with the price that its head reads.

    encoder = Encoder.open(Path("checkpoints/qwen3_finetune"), device="cpu")
    embeddings = encoder.encode(prepared)    # as often as needed: the weights are read only once
    encoder.reasons                          # why rows have no embedding: {"0017": "empty text"}

N rows of a table, n chosen rows, D_in width of the encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from contracts.embeddings import Embeddings
from contracts.workspace import QWEN_TEXT, STRUCTURAL_FEATURES
from qwen3_finetune.config import QwenSettings
from qwen3_finetune.data import TextRows
from qwen3_finetune.finished import (
    Computation,
    FinishedRun,
    OutOfFoldRun,
    embeddings_fitted_on,
)
from training.run_folder import RunFolder
from training.weights import weights_hash

if TYPE_CHECKING:
    import pandas as pd

EMPTY_TEXT = "empty text"


class Encoder:
    """Embeds and prices texts. `open` makes one from a run folder.

    Args:
        meta: what the embeddings say of their encoder.
    """

    def __init__(self, finished: FinishedRun | OutOfFoldRun, meta: dict[str, Any]):
        self.finished = finished
        self.meta = meta
        self.width = finished.width
        """D_in + 3, or D_in + 1 + 3 of an out-of-fold run"""
        self.reasons: dict[str, str] = {}
        """why rows of the last call of `encode` have no embedding: sample_id to reason"""

    @classmethod
    def open(
        cls,
        run_folder: Path,
        *,
        name: str = QWEN_TEXT,
        device: str = "auto",
        precision: str = "auto",
        tokens_per_batch: int | None = None,
        model: str | None = None,
        align: bool = True,
    ) -> Encoder:
        """Load a finished run, out of fold or not.

        Args:
            name: what the embeddings are called.
            device: auto, cpu, mps, cuda or cuda:<number>.
            precision: auto, fp32 or bf16; auto is bf16 on CUDA and fp32 elsewhere.
            tokens_per_batch: padded tokens per batch; None suits the device.
            model: hub id or folder of the pretrained model, where it has moved since training.
            align: see OutOfFoldRun.

        Raises:
            InputError: there is no finished run in this folder, its model is missing, or there is no such device.
        """
        run = RunFolder.finished(run_folder, "qwen3_finetune")
        meta = encoder_meta(run, name=name, align=align)
        computation = Computation(device, precision, tokens_per_batch, model)
        if run.is_out_of_fold:
            return cls(OutOfFoldRun(run.path, computation, align=align), meta)
        return cls(FinishedRun(run.path, computation), meta)

    def encode(self, prepared: pd.DataFrame, images: Path | None = None) -> Embeddings:
        """Embeddings (N, width) float32, in the order of the rows.

        A row without a text has `valid` False and zeros, and stands in `reasons`.

        Args:
            prepared: a prepared table. With a column `fold` it is the whole training table, and an out-of-fold run
                then embeds each row by the encoder that has not seen it; any other table by the encoder of all rows.
            images: not needed; the encoders of pictures have it.
        """
        rows = TextRows.of(prepared)
        features, _ = self.encode_rows(rows)
        empty = rows.sample_ids[~rows.valid].tolist()
        self.reasons = dict.fromkeys(empty, EMPTY_TEXT)
        return Embeddings(rows.sample_ids, features, rows.valid, dict(self.meta))

    def encode_rows(
        self, rows: TextRows, part: slice | np.ndarray = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (n, width), zero in rows without a text, and log price (n,) of all rows in `part`; float32."""
        features, log_price = self.finished.encode(rows, part)
        features[~rows.valid[part]] = 0
        return features, log_price

    def log_price(self, prepared: pd.DataFrame) -> np.ndarray:
        """The head's log1p(price), (N,) float32; a row without a text has one, too. For `prepared` see `encode`."""
        _, log_price = self.finished.encode(TextRows.of(prepared))
        return log_price


def encoder_meta(run: RunFolder, *, name: str, align: bool) -> dict[str, Any]:
    """What embeddings of a finished run say of their encoder. It takes no weights to tell."""
    trained_with = run.settings(QwenSettings)
    out_of_fold = run.is_out_of_fold
    random_weights = " (random weights)" if trained_with.random_weights else ""
    return {
        "name": name,
        "stage": "qwen3_finetune",
        "run": run.name,
        "model": trained_with.model + random_weights,
        "checkpoint": weights_hash(run.path),
        "trained": trained_with.train,
        "pooling": trained_with.pooling,
        "last_columns": ["log_price", *STRUCTURAL_FEATURES] if out_of_fold else list(STRUCTURAL_FEATURES),
        "aligned": out_of_fold and align,
        "fitted_on": embeddings_fitted_on(run),
    }
