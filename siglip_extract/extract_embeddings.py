"""Embed the pictures and texts of one prepared table with frozen SigLIP towers.

    python -m siglip_extract.extract_embeddings train            # both towers, published checkpoints
    python -m siglip_extract.extract_embeddings new              # any table that data.prepare has made
    python -m siglip_extract.extract_embeddings test --tower image --image-model /models/siglip-so400m
    torchrun --nproc_per_node=4 -m siglip_extract.extract_embeddings train

Nothing is trained. An interrupted run continues with the shards that are not yet written.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from contracts.errors import run_entry_point
from contracts.files import read_json, sidecar_of
from contracts.workspace import SIGLIP_IMAGE, Workspace
from siglip_extract.config import PRESETS, Settings
from siglip_extract.encoder import Encoder
from training.device import build_accelerator, choose_device, guard_torchvision
from training.extraction import (
    ShardedExtraction,
    embed_shards,
    file_meta,
    print_failures,
    write_picture_failures,
)
from training.settings import parse_settings

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import Accelerator


def open_encoder(kind: Literal["image", "text"], settings: Settings) -> Encoder:
    """The encoder of one kind that the settings describe.

    With random weights the text tower has no tokenizer yet. It learns one from the texts of `train`, whichever table
    is embedded, so that all tables of a workspace share it.
    """
    workspace = Workspace(settings.workspace)
    model = settings.image_model if kind == "image" else settings.text_model
    folder = workspace.path("run", name="siglip_extract")
    tokenizer = ""
    if kind == "text" and settings.random_weights:
        guard_torchvision()
        from siglip_extract.model import train_tokenizer

        tokenizer = train_tokenizer(model, workspace.prepared("train")["text"].tolist(), folder).name
    return Encoder.open(
        model,
        kind=kind,
        random_weights=settings.random_weights,
        seed=settings.seed,
        tokenizer=tokenizer,
        folder=folder,
        storage=settings.storage,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        workers=settings.workers,
    )


def extract(kind: Literal["image", "text"], split: str, settings: Settings, accelerator: Accelerator) -> None:
    """Run one tower over one table. Under torchrun the processes share the shards, and the first one joins them."""
    workspace = Workspace(settings.workspace)
    table = workspace.prepared(split)
    with accelerator.main_process_first():  # one process downloads the checkpoint or trains the tokenizer
        encoder = open_encoder(kind, settings)
    rows = encoder.rows(table, workspace.images_folder())
    meta = file_meta(encoder.meta, workspace, split, rows.identity())
    path = workspace.path("embeddings", name=meta["name"], split=split)
    extraction = ShardedExtraction(path, table["sample_id"].to_numpy(), meta, settings.shard_rows)
    if accelerator.is_main_process:
        announce(extraction, settings)

    shards = embed_shards(
        extraction.pending(),
        rows,
        [encoder],
        batch_size=encoder.batch_size,
        workers=encoder.workers,
        device=encoder.device,
        description=f"{meta['name']} {split}",
        quiet=not accelerator.is_main_process,
    )
    for shard in shards:
        stored = shard.embeddings[0].astype(encoder.storage)
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
    """Join the shards, list the rows without an embedding, and warn if another table has another encoder's."""
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
    own = workspace.path("embeddings", name=meta["name"], split=meta["split"])
    for path in sorted(own.parent.glob(f"{meta['name']}_*.pkl")):
        sidecar = sidecar_of(path)
        stored = read_json(sidecar) if sidecar.is_file() else {}
        if stored.get("name") == meta["name"] and stored["checkpoint"] != meta["checkpoint"]:
            print(
                f"warning: {path} comes from another encoder; extract {stored['split']} again",
                file=sys.stderr,
            )


def main(argv: list[str] | None = None) -> None:
    settings, split = parse_settings(
        Settings, argv, description=__doc__.split("\n")[0], presets=PRESETS, positional={"table": None}
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
