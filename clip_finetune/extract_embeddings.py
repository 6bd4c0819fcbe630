"""Write the image embeddings of one split, and the price head's predictions, from a finished run.

    python -m clip_finetune.extract_embeddings train --workspace demo
    torchrun --nproc_per_node 8 -m clip_finetune.extract_embeddings test

An interrupted extraction continues with the shards that are missing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_finetune.config import ClipSettings, ExtractSettings
from contracts.embeddings import Embeddings, read_embeddings
from contracts.errors import run_entry_point
from contracts.files import read_json
from contracts.predictions import remove_predictions, write_predictions
from contracts.splits import fitted_on, roles, split_hash
from contracts.workspace import SPLITS, Workspace
from training.extraction import ShardedExtraction, embed_shards, print_failures, write_picture_failures
from training.pictures import PictureRows
from training.run_folder import RunFolder, weights_hash
from training.settings import parse_settings

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from accelerate import Accelerator


class ImageEncoder:
    """The image tower of a finished run, on the accelerator's device."""

    def __init__(self, run: RunFolder, accelerator: Accelerator):
        from clip_finetune.model import load_model

        self.accelerator = accelerator
        self.model = load_model(run.path).to(accelerator.device)
        self.width = self.model.width

    def pictures(self, table: pd.DataFrame, folder: Path) -> PictureRows:
        """The rows of a prepared table as inputs of this encoder."""
        return PictureRows(table["image"], folder, self.model.transform(), min_side=self.model.side)

    def encode_batch(self, pictures: torch.Tensor) -> np.ndarray:
        """Embeddings (B, D_in) float32 of unit length, of model inputs (B, 3, S, S)."""
        import torch

        with torch.no_grad(), self.accelerator.autocast():
            pictures = pictures.to(self.accelerator.device, non_blocking=True)
            return self.model.encode_image(pictures).cpu().numpy()

    def price(self, embeddings: np.ndarray) -> np.ndarray:
        """The head's log1p(price), (N,) float64, of embeddings (N, D_in)."""
        import torch

        with torch.no_grad():
            image = torch.from_numpy(embeddings).to(self.accelerator.device)
            return self.model.price_head.predict(image).cpu().double().numpy()


def embedding_meta(
    settings: ExtractSettings, split: str, run: RunFolder, trained_with: ClipSettings, pictures: PictureRows
) -> dict[str, object]:
    """Meta of the embedding file. A shard written under another meta (apart from `command`) is made again."""
    trained = read_json(run.path / "summary.json")["trained"]
    # initial weights have seen no fold
    encoder_folds = roles(trained_with.holdout).fitted_on if trained else ()
    return {
        "name": settings.embedding,
        "split": split,
        "model": f"{trained_with.model} {trained_with.pretrained}".strip(),
        "run": settings.run,
        "checkpoint": weights_hash(run.path),
        "normalised": True,
        "holdout": trained_with.holdout,
        "inputs": pictures.identity(),
        "fitted_on": fitted_on(encoder_folds=encoder_folds),
        "split_hash": split_hash(Workspace(settings.workspace).folds()),
        "command": " ".join(sys.argv),
    }


def finish(
    extraction: ShardedExtraction, workspace: Workspace, table: pd.DataFrame, encoder: ImageEncoder
) -> None:
    """Join the shards, list what has no embedding and write the price head's predictions."""
    name = extraction.meta["name"]
    split = extraction.meta["split"]
    failures = extraction.failures()
    write_picture_failures(workspace.path("image_failures", name=name, split=split), table, failures)
    extraction.finish()
    content = read_embeddings(extraction.path)
    print(
        f"{extraction.path}: {len(content.valid)} rows, {content.valid.sum()} with a picture, {content.width}-d"
    )
    print_failures(name, failures)
    predict(workspace, encoder, content)


def predict(workspace: Workspace, encoder: ImageEncoder, content: Embeddings) -> None:
    """Write the price head's predictions of the rows with an embedding."""
    meta = content.meta
    # without a head, or with one that was never fitted, there is nothing to predict with
    if encoder.model.price_head is None or not any(meta["fitted_on"]):
        remove_predictions(workspace, meta["run"], meta["split"])
        return
    sample_ids = content.sample_ids[content.valid]
    fold = workspace.folds().loc[sample_ids].to_numpy() if meta["split"] == "train" else None
    write_predictions(
        workspace,
        meta["run"],
        meta["split"],
        sample_ids,
        encoder.price(content.embeddings[content.valid]),
        meta={
            "stage": "clip_finetune",
            "model": meta["run"],
            "checkpoint": meta["checkpoint"],
            "fitted_on": meta["fitted_on"],
        },
        fold=fold,
    )


def extract(settings: ExtractSettings, split: str, accelerator: Accelerator) -> None:
    """Embed one table. Under torchrun the processes share the shards, and the first one joins them."""
    workspace = Workspace(settings.workspace)
    run = RunFolder.finished(workspace.path("run", name=settings.run), "clip_finetune")
    trained_with = run.settings(ClipSettings)
    table = workspace.prepared(split)
    encoder = ImageEncoder(run, accelerator)
    pictures = encoder.pictures(table, workspace.images_folder())
    extraction = ShardedExtraction(
        workspace.path("embeddings", name=settings.embedding, split=split),
        table["sample_id"].to_numpy(),
        embedding_meta(settings, split, run, trained_with, pictures),
        settings.shard_rows,
    )
    shards = embed_shards(
        extraction.pending(),
        pictures,
        [encoder],
        batch_size=settings.batch_size or trained_with.batch_size,
        workers=trained_with.workers if settings.workers is None else settings.workers,
        device=accelerator.device,
        description=f"{settings.embedding} {split}",
        quiet=not accelerator.is_main_process,
    )
    for shard in shards:
        extraction.write(shard.rows, shard.embeddings[0], shard.valid, shard.reasons)
    if extraction.wait():
        finish(extraction, workspace, table, encoder)


def main(argv: list[str] | None = None) -> None:
    settings, split = parse_settings(
        ExtractSettings, argv, description=__doc__.split("\n")[0], positional={"split": SPLITS}
    )
    from training.device import build_accelerator, choose_device, guard_torchvision

    guard_torchvision()
    accelerator = build_accelerator(choose_device(settings.device), settings.precision)
    extract(settings, split, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_entry_point(main)
