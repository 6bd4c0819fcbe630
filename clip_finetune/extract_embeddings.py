"""Write the image embeddings of one split, and the price head's predictions, from a finished run.

    python -m clip_finetune.extract_embeddings train --workspace demo
    torchrun --nproc_per_node 8 -m clip_finetune.extract_embeddings test

An interrupted extraction continues with the shards that are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from clip_finetune.config import ClipSettings, ExtractSettings
from contracts.embeddings import read_embeddings
from contracts.errors import run_entry_point
from contracts.files import atomic_write, read_json
from contracts.splits import fitted_on, roles, split_hash
from contracts.workspace import SPLITS, Workspace
from training.extraction import ShardedExtraction
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from accelerate import Accelerator

    from clip_finetune.model import PriceClip


def embedding_meta(
    settings: ExtractSettings, split: str, run: RunFolder, trained_with: ClipSettings
) -> dict[str, object]:
    from clip_finetune.model import model_sha256

    trained = read_json(run.path / "summary.json")["trained"]
    # initial weights have seen no fold
    encoder_folds = roles(trained_with.holdout).fitted_on if trained else ()
    return {
        "name": settings.name,
        "split": split,
        "model": f"{trained_with.model} {trained_with.pretrained}".strip(),
        "checkpoint": settings.run,
        "checkpoint_sha256": model_sha256(run.path),
        "normalised": True,
        "holdout": trained_with.holdout,
        "fitted_on": fitted_on(encoder_folds=encoder_folds),
        "split_hash": split_hash(Workspace(settings.workspace).folds()),
        "command": " ".join(sys.argv),
    }


def encode(model: PriceClip, picture: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Embeddings (B, D_in) float32, on the CPU, of model inputs (B, 3, S, S)."""
    import torch

    with torch.no_grad(), accelerator.autocast():
        return model.encode_image(picture.to(accelerator.device, non_blocking=True)).cpu()


def embed(
    model: PriceClip, batches: Iterable[dict[str, torch.Tensor]], accelerator: Accelerator, progress: tqdm
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, D_in) float32 and valid (n,) of the rows in `batches`; a row without a picture is zero."""
    import torch

    embeddings, valid = [], []
    for batch in batches:
        picture, usable = batch["picture"], batch["valid"]
        found = torch.zeros(len(usable), model.width)
        if usable.any():
            if not usable.all():  # the selection is a copy that is no longer in pinned memory
                picture = picture[usable]
            found[usable] = encode(model, picture, accelerator)
        embeddings.append(found.numpy())
        valid.append(usable.numpy())
        progress.update(len(usable))
    return np.concatenate(embeddings), np.concatenate(valid)


def write_failures(
    workspace: Workspace, name: str, split: str, table: pd.DataFrame, valid: np.ndarray
) -> None:
    """sample_id, image, reason of the rows without an embedding."""
    from clip_finetune.pictures import picture_paths, reasons_unusable

    failed = table.loc[~valid, ["sample_id", "image"]]
    reasons = reasons_unusable(picture_paths(failed, workspace.images_folder()), workers=0)
    # a finished shard keeps what it found, even if the picture has come since
    failed["reason"] = [reason or "was unusable when embedded" for reason in reasons]
    with atomic_write(workspace.path("image_failures", name=name, split=split)) as file:
        failed.to_csv(file, index=False)


def write_predictions(
    workspace: Workspace, run: str, split: str, model: PriceClip, sample_ids: np.ndarray, image: np.ndarray
) -> None:
    """sample_id, log_price and, in train, fold; image (n, D_in) are the embeddings of these rows."""
    import pandas as pd
    import torch

    with torch.no_grad():
        log_price = model.price_head.cpu().predict(torch.from_numpy(image)).double().numpy()
    predictions = pd.DataFrame({"sample_id": sample_ids, "log_price": log_price})
    if split == "train":
        predictions["fold"] = workspace.folds().loc[sample_ids].to_numpy()
    with atomic_write(workspace.path("predictions", name=run, split=split)) as file:
        predictions.to_csv(file, index=False)


def finish(
    extraction: ShardedExtraction, run: RunFolder, workspace: Workspace, table: pd.DataFrame, model: PriceClip
) -> None:
    """Join the shards, list what has no embedding and write the price head's predictions."""
    extraction.finish()
    meta, content = extraction.meta, read_embeddings(extraction.path)
    valid, split = content.valid, meta["split"]
    write_failures(workspace, meta["name"], split, table, valid)
    # a head that was never fitted predicts nothing
    if model.price_head is not None and any(meta["fitted_on"]):
        ids, image = content.sample_ids[valid], content.embeddings[valid]
        write_predictions(workspace, run.path.name, split, model, ids, image)
    else:
        workspace.path("predictions", name=run.path.name, split=split).unlink(missing_ok=True)
    print(f"{extraction.path}: {len(valid)} rows, {valid.sum()} with a picture, {content.width}-d")


def main(argv: list[str] | None = None) -> None:
    settings, split = parse_settings(
        ExtractSettings, argv, description=__doc__.split("\n")[0], positional={"split": SPLITS}
    )

    from accelerate import Accelerator

    from training.device import choose_device, guard_torchvision, mixed_precision

    guard_torchvision()
    from clip_finetune.model import load_model
    from clip_finetune.pictures import CatalogRows, load_batches
    from clip_finetune.pictures import split as split_rows

    workspace = Workspace(settings.workspace)
    run = RunFolder.finished(workspace.path("run", name=settings.run), "clip_finetune")
    trained_with = run.settings(ClipSettings)
    batch_size = settings.batch_size or trained_with.batch_size
    workers = trained_with.workers if settings.workers is None else settings.workers
    table, meta = workspace.prepared(split), embedding_meta(settings, split, run, trained_with)
    device = choose_device(settings.device)
    precision = mixed_precision(settings.precision, device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    model = load_model(run.path).to(accelerator.device)
    rows = CatalogRows(table, workspace.images_folder(), model.transform(), model.side)

    path = workspace.path("embeddings", name=settings.name, split=split)
    extraction = ShardedExtraction(path, table["sample_id"].to_numpy(), meta, settings.shard_rows)
    own = extraction.pending()
    with tqdm(
        total=sum(part.stop - part.start for part in own), desc=f"{settings.name} {split}", unit="row",
        disable=not accelerator.is_main_process,
    ) as progress:  # fmt: skip
        # one loader over all shards keeps its workers busy across the borders
        batches = [split_rows(range(part.start, part.stop), batch_size) for part in own]
        loaded = iter(load_batches(rows, list(chain.from_iterable(batches)), workers, accelerator.device))
        for part, batches_of_part in zip(own, batches, strict=True):
            extraction.write(part, *embed(model, islice(loaded, len(batches_of_part)), accelerator, progress))
    if extraction.wait():
        finish(extraction, run, workspace, table, model)


if __name__ == "__main__":
    run_entry_point(main)
