"""The image tower of a finished run as an encoder of tables, with the price that its head reads from an embedding.

    encoder = Encoder.open(Path("checkpoints/clip_finetune"), device="cpu")
    embeddings = encoder.encode(prepared, images)    # as often as needed: the weights are read only once
    encoder.reasons                                  # why rows have no embedding: {"0017": "missing"}

N rows of a table, B batch, S side of a picture in pixels, D_in width of the joint image-text space.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_finetune.config import ClipSettings
from contracts.embeddings import Embeddings
from contracts.files import read_json
from contracts.splits import fitted_on
from contracts.workspace import CLIP_IMAGE
from training.device import choose_device, choose_dtype, guard_torchvision
from training.extraction import encode_table
from training.pictures import PictureRows
from training.run_folder import RunFolder, part_folder
from training.weights import weights_hash

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from clip_finetune.model import PriceClip


class Encoder:
    """Embeds pictures. `open` makes one from a run folder.

    Args:
        meta: what the embeddings say of their encoder.
        device: where the model computes.
        dtype: of the forward pass, under autocast.
        batch_size: pictures per forward pass.
        workers: processes that decode pictures; 0 decodes in this process.
    """

    def __init__(
        self,
        model: PriceClip,
        *,
        meta: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        workers: int,
    ):
        self.model = model.to(device)
        self.meta = meta
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.workers = workers
        self.width = model.width
        self.reasons: dict[str, str] = {}
        """why rows of the last call of `encode` have no embedding: sample_id to reason"""

    @classmethod
    def open(
        cls,
        run_folder: Path,
        *,
        name: str = CLIP_IMAGE,
        device: str = "auto",
        precision: str = "auto",
        batch_size: int | None = None,
        workers: int | None = 0,
    ) -> Encoder:
        """Load the model of a finished run; of an out-of-fold run that of all rows.

        Training rows are embedded out of fold by `clip_finetune.out_of_fold`.

        Args:
            name: what the embeddings are called.
            device: auto, cpu, mps, cuda or cuda:<number>.
            precision: auto, fp32 or bf16; auto is bf16 on CUDA and fp32 elsewhere.
            batch_size, workers: see the class; None takes the value of the run.

        Raises:
            InputError: there is no finished run in this folder, or no such device.
        """
        run = RunFolder.finished(run_folder, "clip_finetune")
        trained_with = run.settings(ClipSettings)
        chosen = choose_device(device)
        guard_torchvision()
        from clip_finetune.model import load_model

        folder = run.path / part_folder(None) if run.is_out_of_fold else run.path
        return cls(
            load_model(folder),
            meta=_meta(run, RunFolder(folder), name),
            device=chosen,
            dtype=choose_dtype(precision, chosen),
            batch_size=batch_size or trained_with.batch_size,
            workers=trained_with.workers if workers is None else workers,
        )

    def encode(self, prepared: pd.DataFrame, images: Path | None = None) -> Embeddings:
        """Embeddings (N, D_in) float32 of unit length, in the order of the rows.

        A row whose picture cannot be used has `valid` False and zeros, and stands in `reasons`.

        Args:
            prepared: columns sample_id and image, the file name of the picture or "".
            images: folder of the pictures; None where there is none.
        """
        embeddings, self.reasons = encode_table(
            prepared["sample_id"].to_numpy(),
            self.rows(prepared, images),
            self,
            meta=self.meta,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
        )
        return embeddings

    def rows(self, prepared: pd.DataFrame, images: Path | None) -> PictureRows:
        """The rows of a prepared table as inputs of this encoder."""
        return PictureRows(prepared["image"], images, self.model.transform(), min_side=self.model.side)

    def encode_batch(self, pictures: torch.Tensor) -> np.ndarray:
        """Embeddings (B, D_in) float32 of unit length, of model inputs (B, 3, S, S)."""
        import torch

        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.no_grad(), autocast:
            pictures = pictures.to(self.device, non_blocking=True)
            return self.model.encode_image(pictures).cpu().numpy()

    @property
    def can_price(self) -> bool:
        """Whether the run fitted a price head, so that `log_price` means something."""
        return self.model.price_head is not None and any(self.meta["fitted_on"])

    def log_price(self, embeddings: np.ndarray, fold: np.ndarray | None = None) -> np.ndarray:
        """The head's log1p(price), (N,) float64, of embeddings (N, D_in).

        Args:
            fold: not needed, since one head prices all rows; the out-of-fold encoder has several.
        """
        import torch

        assert self.model.price_head is not None, "ask can_price first"
        with torch.no_grad():
            image = torch.from_numpy(embeddings).to(self.device)
            return self.model.price_head.predict(image).cpu().double().numpy()


def _meta(run: RunFolder, opened: RunFolder, name: str) -> dict[str, Any]:
    """What embeddings say of their encoder.

    Args:
        run: names the encoder, and identifies it by all its weights.
        opened: folder of the model that is opened: `run` itself or one model of an out-of-fold run.
    """
    trained_with = opened.settings(ClipSettings)
    trained = read_json(opened.path / "summary.json")["trained"]
    # initial weights have seen no fold
    encoder_folds = trained_with.roles.fitted_on if trained else ()
    return {
        "name": name,
        "stage": "clip_finetune",
        "run": run.name,
        "model": f"{trained_with.model} {trained_with.pretrained}".strip(),
        "checkpoint": weights_hash(run.path),
        "normalised": True,
        "holdout": trained_with.holdout,
        "fitted_on": fitted_on(encoder_folds=encoder_folds),
    }
