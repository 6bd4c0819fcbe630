"""A frozen SigLIP tower as an encoder of tables.

    encoder = Encoder.open("google/siglip-so400m-patch14-384", kind="image")
    embeddings = encoder.encode(prepared, images)    # as often as needed: the weights are read only once
    encoder.reasons                                  # why rows have no embedding: {"0017": "missing"}

An embedding file says how to open its encoder again: `Encoder.open(**meta["run"], folder=...)`.

N rows of a table, B batch, T tokens, D_in width of the embedding.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from contracts.embeddings import Embeddings
from contracts.splits import fitted_on
from contracts.workspace import SIGLIP_IMAGE, SIGLIP_TEXT
from training.device import choose_device, choose_dtype, guard_torchvision
from training.extraction import encode_table
from training.pictures import PictureRows, read_pixels

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from siglip_extract.model import Tower

NAMES = {"image": SIGLIP_IMAGE, "text": SIGLIP_TEXT}
"""Name of the embedding file of each kind of tower."""


class Encoder:
    """Embeds pictures or texts with one tower. `open` makes it.

    Args:
        tower: on its device.
        run: the arguments of `open` that decide what the embeddings are.
        batch_size: pictures or texts per forward pass.
        workers: processes that decode pictures or tokenise texts; 0 does it in this process.
    """

    def __init__(self, tower: Tower, run: dict[str, Any], *, batch_size: int, workers: int):
        self.tower = tower
        self.kind: str = run["kind"]
        self.storage: str = run["storage"]
        self.batch_size = batch_size
        self.workers = workers
        self.width = tower.width
        self.device = tower.device
        self.meta = {
            "name": NAMES[self.kind],
            "stage": "siglip_extract",
            "run": run,
            "model": f"{run['model']} with random weights" if run["random_weights"] else run["model"],
            "checkpoint": tower.checkpoint(),
            "precision": str(tower.dtype).removeprefix("torch."),
            "fitted_on": fitted_on(encoder_folds=()),  # frozen: it was fitted on no row of this catalogue
        }
        """what the embeddings say of their encoder"""
        self.reasons: dict[str, str] = {}
        """why rows of the last call of `encode` have no embedding: sample_id to reason"""

    @classmethod
    def open(
        cls,
        model: str,
        *,
        kind: Literal["image", "text"],
        random_weights: bool = False,
        seed: int = 0,
        tokenizer: str = "",
        folder: Path | None = None,
        storage: str = "float16",
        device: str = "auto",
        precision: str = "auto",
        batch_size: int = 64,
        workers: int = 0,
    ) -> Encoder:
        """Load one tower.

        Args:
            model: SigLIP checkpoint: hub id, local folder, or with random weights a known architecture.
            random_weights: draw the weights from `seed` instead of reading them.
            tokenizer: file name of the tokenizer in `folder`. Only a text tower with random weights needs it.
            folder: checkpoints/siglip_extract of the workspace that the tokenizer was trained in.
            storage: float16 or float32, the number format of the embeddings.
            device: auto, cpu, mps, cuda or cuda:<number>.
            precision: auto, fp32, bf16 or fp16; auto is bf16 on CUDA and fp32 elsewhere.
            batch_size, workers: see the class.

        Raises:
            InputError: no such checkpoint, tokenizer or device.
        """
        chosen = choose_device(device)
        guard_torchvision()
        import torch

        from siglip_extract.model import image_tower, text_tower

        with torch.random.fork_rng(devices=[]):  # the caller's own random numbers go on as before
            torch.manual_seed(seed)
            if kind == "image":
                tower = image_tower(model, random_weights=random_weights)
            else:
                tokenizer_file = folder / tokenizer if folder and tokenizer else None
                tower = text_tower(model, random_weights=random_weights, tokenizer_file=tokenizer_file)
        run = {
            "model": model,
            "kind": kind,
            "random_weights": random_weights,
            "seed": seed,
            "tokenizer": tokenizer,
            "storage": storage,
        }
        tower.to(chosen, choose_dtype(precision, chosen))
        return cls(tower, run, batch_size=batch_size, workers=workers)

    def encode(self, prepared: pd.DataFrame, images: Path | None = None) -> Embeddings:
        """Embeddings (N, D_in) in the format of `storage`, in the order of the rows.

        A row without a usable picture, or without a text, has `valid` False and zeros, and stands in `reasons`.

        Args:
            prepared: column sample_id, and image (file name or "") for the image tower or text, entity_name and
                catalog_content for the text tower.
            images: folder of the pictures; None where there is none. The text tower does not need it.
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
        # rounded as in the file, because models were fitted on what the file holds
        embeddings.embeddings = embeddings.embeddings.astype(self.storage)
        return embeddings

    def rows(self, prepared: pd.DataFrame, images: Path | None) -> PictureRows | Texts:
        """The rows of a prepared table as inputs of the tower."""
        if self.kind == "text":
            return Texts(prepared, self.tower)
        side = self.tower.picture_size
        return PictureRows(prepared["image"], images, self.tower.prepare, min_side=side, read=read_pixels)

    def encode_batch(self, inputs: torch.Tensor) -> np.ndarray:
        """Embeddings (B, D_in) float32 of inputs that the rows have prepared."""
        return self.tower.encode_batch(inputs)


class Texts:
    """The rows of the text tower: `text` of the prepared table, of which the tower sees the first 64 tokens."""

    def __init__(self, table: pd.DataFrame, tower: Tower):
        # `text` of a product without name and description is " [SEP] "
        empty = (table["entity_name"] + table["catalog_content"]).str.strip() == ""
        self.texts = table["text"].mask(empty, "").tolist()
        self.prepare = tower.prepare

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> str:
        return self.texts[row]

    def collate(self, texts: list[str]) -> tuple[torch.Tensor | None, list[str]]:
        """Token ids (B', T) of the B' texts that are not empty, and a reason or "" for all. Tokenises them at once."""
        usable = [text for text in texts if text]
        reasons = ["" if text else "empty text" for text in texts]
        return self.prepare(usable) if usable else None, reasons

    def identity(self) -> str:
        """A hash that changes when a text changes."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()[:16]
