"""Embed pictures and texts with frozen SigLIP towers.

    python -m siglip_extract.extract_embeddings train            # both towers, published checkpoints
    python -m siglip_extract.extract_embeddings test --tower image --image-model /models/siglip-so400m
    torchrun --nproc_per_node=4 -m siglip_extract.extract_embeddings train

Nothing is trained. An interrupted run continues with the shards that are not yet written.
"""

from __future__ import annotations

import hashlib
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from contracts.errors import run_entry_point
from contracts.files import read_json, sidecar_of
from contracts.splits import fitted_on, split_hash
from contracts.workspace import SIGLIP_IMAGE, SIGLIP_TEXT, SPLITS, Workspace
from siglip_extract.config import PRESETS, Settings
from training.device import build_accelerator, choose_device, choose_dtype, guard_torchvision, seed_everything
from training.extraction import ShardedExtraction, embed_shards, print_failures, write_picture_failures
from training.pictures import PictureRows, read_pixels
from training.settings import parse_settings

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from siglip_extract.model import Tower

NAMES = {"image": SIGLIP_IMAGE, "text": SIGLIP_TEXT}
"""Name of the embedding file of each tower."""


def pictures(table: pd.DataFrame, folder: Path, tower: Tower) -> PictureRows:
    """The rows of the image tower."""
    return PictureRows(table["image"], folder, tower.prepare, min_side=tower.picture_size, read=read_pixels)


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


def load_tower(kind: str, settings: Settings) -> Tower:
    """The tower of one kind, image or text; with random weights the tokenizer learns from the prepared texts."""
    from siglip_extract.model import image_tower, text_tower

    seed_everything(settings.seed)
    if kind == "image":
        return image_tower(settings.image_model, random_weights=settings.random_weights)
    if not settings.random_weights:
        return text_tower(settings.text_model)
    workspace = Workspace(settings.workspace)
    corpus = [text for split in SPLITS for text in workspace.prepared(split)["text"]]
    folder = workspace.path("run", name="siglip_extract")
    return text_tower(settings.text_model, random_weights=True, corpus=corpus, folder=folder)


def embedding_meta(
    kind: str, split: str, tower: Tower, rows: PictureRows | Texts, settings: Settings
) -> dict[str, Any]:
    """Meta of the embedding file. A shard written under another meta (apart from `command`) is made again."""
    model = settings.image_model if kind == "image" else settings.text_model
    return {
        "name": NAMES[kind],
        "split": split,
        "model": f"{model} with random weights" if settings.random_weights else model,
        "checkpoint": tower.checkpoint(),
        "precision": str(tower.dtype).removeprefix("torch."),
        "storage": settings.storage,
        "inputs": rows.identity(),
        "fitted_on": fitted_on(encoder_folds=()),  # frozen: it was fitted on no row of this catalogue
        "split_hash": split_hash(Workspace(settings.workspace).folds()),
        "command": " ".join(sys.argv),
    }


def extract(kind: str, split: str, settings: Settings, accelerator: Accelerator) -> None:
    """Run one tower over one table. Under torchrun the processes share the shards, and the first one joins them."""
    workspace = Workspace(settings.workspace)
    table = workspace.prepared(split)
    device = accelerator.device
    with accelerator.main_process_first():  # one process downloads the checkpoint or trains the tokenizer
        tower = load_tower(kind, settings)
    tower.to(device, choose_dtype(settings.precision, device))
    rows = pictures(table, workspace.images_folder(), tower) if kind == "image" else Texts(table, tower)
    meta = embedding_meta(kind, split, tower, rows, settings)
    path = workspace.path("embeddings", name=meta["name"], split=split)
    extraction = ShardedExtraction(path, table["sample_id"].to_numpy(), meta, settings.shard_rows)
    if accelerator.is_main_process:
        announce(extraction, settings)

    shards = embed_shards(
        extraction.pending(),
        rows,
        [tower],
        batch_size=settings.batch_size,
        workers=settings.workers,
        device=device,
        description=f"{meta['name']} {split}",
        quiet=not accelerator.is_main_process,
    )
    for shard in shards:
        stored = shard.embeddings[0].astype(settings.storage)
        extraction.write(shard.rows, stored, shard.valid, shard.reasons)
    if extraction.wait():
        finish(extraction, workspace, table, settings.keep_shards)


def announce(extraction: ShardedExtraction, settings: Settings) -> None:
    name = extraction.meta["name"]
    if settings.random_weights:
        print(f"{name}: {extraction.meta['model']}, for demonstration only: nothing in it was learned")
    total = len(extraction.shards)
    if there := total - len(extraction.missing()):
        print(f"{name}: {there} of {total} shards were there already")


def finish(
    extraction: ShardedExtraction, workspace: Workspace, table: pd.DataFrame, keep_shards: bool = False
) -> None:
    """Join the shards, list the rows without an embedding, and warn if the other split has another encoder's."""
    name = extraction.meta["name"]
    split = extraction.meta["split"]
    failures = extraction.failures()
    if name == SIGLIP_IMAGE:
        write_picture_failures(workspace.path("image_failures", name=name, split=split), table, failures)
    extraction.finish(keep_shards)
    print(f"{extraction.path}: {len(table)} rows, {len(table) - len(failures)} with an embedding")
    print_failures(name, failures)
    warn_of_other_encoder(extraction.meta, workspace)


def warn_of_other_encoder(meta: dict[str, Any], workspace: Workspace) -> None:
    """Embeddings of two encoders do not compare, and their shapes would not tell."""
    for split in set(SPLITS) - {meta["split"]}:
        path = workspace.path("embeddings", name=meta["name"], split=split)
        sidecar = sidecar_of(path)
        if sidecar.is_file() and read_json(sidecar).get("checkpoint") != meta["checkpoint"]:
            print(f"warning: {path} comes from another encoder; extract {split} again", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    settings, split = parse_settings(
        Settings, argv, description=__doc__.split("\n")[0], presets=PRESETS, positional={"split": SPLITS}
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers already run in parallel
    guard_torchvision()
    # torch's own limits on waiting, 10 and 30 minutes, are shorter than a large download
    accelerator = build_accelerator(choose_device(settings.device), timeout=timedelta(days=1))
    for kind in ("image", "text") if settings.tower == "both" else (settings.tower,):
        extract(kind, split, settings, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_entry_point(main)
