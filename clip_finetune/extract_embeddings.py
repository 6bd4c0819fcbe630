"""Write the image embeddings of one prepared table, and the price head's predictions, from a finished run.

    python -m clip_finetune.extract_embeddings train --workspace demo
    python -m clip_finetune.extract_embeddings new          # any table that data.prepare has made
    torchrun --nproc_per_node 8 -m clip_finetune.extract_embeddings test

Of an out-of-fold run (--folds), a row of train is embedded and priced by the model that has not seen it, a row of any
other table by the model of all rows. An interrupted extraction continues with the shards that are missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_finetune.config import ExtractSettings
from clip_finetune.encoder import Encoder
from clip_finetune.out_of_fold import OutOfFoldEncoder
from contracts.embeddings import Embeddings, read_embeddings
from contracts.errors import run_entry_point
from contracts.predictions import remove_predictions, write_predictions
from contracts.workspace import Workspace
from training.device import build_accelerator, choose_device, guard_torchvision
from training.extraction import (
    ShardedExtraction,
    embed_shards,
    file_meta,
    print_failures,
    write_picture_failures,
)
from training.pictures import PictureRows
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import Accelerator


def extract(settings: ExtractSettings, split: str, accelerator: Accelerator) -> None:
    """Embed one table. Under torchrun the processes share the shards, and the first one joins them."""
    workspace = Workspace(settings.workspace)
    folder = workspace.path("run", name=settings.run)
    options: dict[str, Any] = {
        "name": settings.embedding,
        "device": settings.device,
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "workers": settings.workers,
    }
    encoder: Encoder | OutOfFoldEncoder
    if split == "train" and RunFolder.finished(folder, "clip_finetune").is_out_of_fold:
        table = workspace.training_table()
        encoder = OutOfFoldEncoder(folder, table, workspace.images_folder(), **options)
        pictures: PictureRows = encoder.rows()
    else:
        table = workspace.prepared(split)
        encoder = Encoder.open(folder, **options)
        pictures = encoder.rows(table, workspace.images_folder())
    extraction = ShardedExtraction(
        workspace.path("embeddings", name=settings.embedding, split=split),
        table["sample_id"].to_numpy(),
        file_meta(encoder.meta, workspace, split, pictures.identity()),
        settings.shard_rows,
    )
    shards = embed_shards(
        extraction.pending(),
        pictures,
        [encoder],
        batch_size=encoder.batch_size,
        workers=encoder.workers,
        device=encoder.device,
        description=f"{settings.embedding} {split}",
        quiet=not accelerator.is_main_process,
    )
    for shard in shards:
        extraction.write(shard.rows, shard.embeddings[0], shard.valid, shard.reasons)
    if extraction.wait():
        finish(extraction, workspace, table, encoder)


def finish(
    extraction: ShardedExtraction,
    workspace: Workspace,
    table: pd.DataFrame,
    encoder: Encoder | OutOfFoldEncoder,
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


def predict(workspace: Workspace, encoder: Encoder | OutOfFoldEncoder, content: Embeddings) -> None:
    """Write the price head's predictions of the rows with an embedding."""
    meta = content.meta
    if not encoder.can_price:
        remove_predictions(workspace, meta["run"], meta["split"])
        return
    sample_ids = content.sample_ids[content.valid]
    fold = workspace.folds().loc[sample_ids].to_numpy() if meta["split"] == "train" else None
    write_predictions(
        workspace,
        meta["run"],
        meta["split"],
        sample_ids,
        encoder.log_price(content.embeddings[content.valid], fold),
        meta={
            "stage": "clip_finetune",
            "model": meta["run"],
            "checkpoint": meta["checkpoint"],
            "fitted_on": meta["fitted_on"],
        },
        fold=fold,
    )


def main(argv: list[str] | None = None) -> None:
    settings, split = parse_settings(
        ExtractSettings, argv, description=__doc__.split("\n")[0], positional={"table": None}
    )
    guard_torchvision()
    accelerator = build_accelerator(choose_device(settings.device), settings.precision)
    extract(settings, split, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_entry_point(main)
