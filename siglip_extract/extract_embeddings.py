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
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from contracts.catalog import read_table
from contracts.errors import run_entry_point
from contracts.files import atomic_write, read_json
from contracts.splits import fitted_on, split_hash
from contracts.workspace import SPLITS, Workspace
from siglip_extract.config import PRESETS, Settings
from training.device import choose_device, choose_dtype, guard_torchvision, seed_everything
from training.extraction import ShardedExtraction
from training.pictures import UnreadablePicture, read_pixels
from training.settings import parse_settings

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from siglip_extract.model import Tower


class Pictures:
    """The rows of the image tower. An item is (pixels (3, S, S) uint8, "") or (None, why there are none)."""

    unit = "pictures"
    read = staticmethod(read_pixels)

    def __init__(self, table: pd.DataFrame, folder: Path, tower: Tower):
        self.names, self.folder = table["image"].tolist(), folder
        self.prepare, self.size = tower.prepare, tower.picture_size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[torch.Tensor | None, str]:
        if not self.names[row]:
            return None, "no image link"
        try:
            picture = self.read(self.folder / self.names[row], min_side=self.size)
        except UnreadablePicture as error:
            return None, str(error)
        return self.prepare(picture), ""

    @staticmethod
    def collate(items: list[tuple[torch.Tensor | None, str]]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Model inputs of the usable rows, and for every row the reason why it is not usable or ""."""
        import torch

        pixels = [pixels for pixels, _ in items if pixels is not None]
        return {"pixel_values": torch.stack(pixels)} if pixels else {}, [reason for _, reason in items]

    def identity(self) -> str:
        """Changes when a picture comes, goes or changes its size, so that a resumed run embeds it."""
        digest = hashlib.sha256()
        for name in self.names:
            path = self.folder / name
            digest.update(f"{name} {path.stat().st_size if name and path.is_file() else '-'}\n".encode())
        return digest.hexdigest()[:16]


class Texts:
    """The rows of the text tower: `text` of the prepared table, of which the first 64 tokens are seen."""

    unit = "texts"

    def __init__(self, table: pd.DataFrame, tower: Tower):
        # `text` of an empty product is " [SEP] "
        empty = (table["entity_name"] + table["catalog_content"]).str.strip() == ""
        self.texts, self.prepare = table["text"].mask(empty, "").tolist(), tower.prepare

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> str:
        return self.texts[row]

    def collate(self, texts: list[str]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """As in Pictures; one call of the tokenizer for the whole batch."""
        usable = [text for text in texts if text]
        inputs = {"input_ids": self.prepare(usable)} if usable else {}
        return inputs, ["" if text else "empty text" for text in texts]

    def identity(self) -> str:
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()[:16]


def load_tower(kind: str, settings: Settings) -> Tower:
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


def describe(
    kind: str, split: str, tower: Tower, rows: Pictures | Texts, settings: Settings, dtype: torch.dtype
) -> dict[str, Any]:
    """Meta of the embedding file. A shard written under another meta (but for `command`) is embedded again."""
    model = settings.image_model if kind == "image" else settings.text_model
    return {
        "name": f"siglip_{kind}",
        "split": split,
        "model": f"{model} with random weights" if settings.random_weights else model,
        "checkpoint": tower.checkpoint(),
        "precision": str(dtype).removeprefix("torch."),
        "storage": settings.storage,
        "inputs": rows.identity(),
        "fitted_on": fitted_on(encoder_folds=()),  # frozen: no row of this catalogue was fitted
        "split_hash": split_hash(Workspace(settings.workspace).folds()),
        "command": " ".join(sys.argv),
    }


def encode(
    tower: Tower, inputs: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> np.ndarray:
    """Embeddings (B, D_in) float32 of one batch of model inputs."""
    import torch

    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), autocast:
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        return tower(inputs).float().cpu().numpy()


def embed(
    rows: Pictures | Texts,
    shards: list[slice],
    tower: Tower,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    progress: tqdm,
) -> Iterator[tuple[slice, np.ndarray, list[str]]]:
    """Yield each shard of n rows with its embeddings (n, D_in) and n reasons, "" for a row that has one."""
    import torch

    # A batch never crosses the border of a shard, so the work can be shared without changing any batch. One
    # loader over all shards keeps its workers busy across the borders.
    batches = [
        [range(start, min(start + settings.batch_size, shard.stop))
         for start in range(shard.start, shard.stop, settings.batch_size)]
        for shard in shards
    ]  # fmt: skip
    loader = torch.utils.data.DataLoader(
        rows, batch_sampler=list(chain.from_iterable(batches)), collate_fn=rows.collate,
        num_workers=settings.workers, pin_memory=device.type == "cuda",
    )  # fmt: skip
    prepared = iter(loader)
    for shard, batches_of_shard in zip(shards, batches, strict=True):
        embeddings = np.zeros((shard.stop - shard.start, tower.width), settings.storage)
        reasons: list[str] = []
        for batch in batches_of_shard:
            inputs, reasons_of_batch = next(prepared)
            usable = [
                row - shard.start for row, reason in zip(batch, reasons_of_batch, strict=True) if not reason
            ]
            if usable:
                embeddings[usable] = encode(tower, inputs, device, dtype)
            reasons += reasons_of_batch
            progress.update(len(batch))
        yield shard, embeddings, reasons


def extract(kind: str, split: str, settings: Settings, state: PartialState, device: torch.device) -> None:
    """Run one tower over one table. Under torchrun the processes share the shards and the first one joins them."""
    started, workspace = time.perf_counter(), Workspace(settings.workspace)
    table, dtype = workspace.prepared(split), choose_dtype(settings.precision, device)
    with state.main_process_first():  # one process downloads the checkpoint or trains the tokenizer
        tower = load_tower(kind, settings)
    rows = Pictures(table, workspace.images_folder(), tower) if kind == "image" else Texts(table, tower)
    meta = describe(kind, split, tower, rows, settings, dtype)
    path = workspace.path("embeddings", name=meta["name"], split=split)
    extraction = ShardedExtraction(path, table["sample_id"].to_numpy(), meta, settings.shard_rows)
    there, total = len(extraction.shards) - len(extraction.missing()), len(extraction.shards)
    mine = extraction.pending()
    if state.is_main_process:
        if settings.random_weights:
            print(f"{meta['name']}: {meta['model']}, a demonstration: nothing in it was learned")
        if there:
            print(f"{meta['name']}: {there} of {total} shards were there already")

    tower.model.to(device)
    with tqdm(
        desc=meta["name"], total=sum(shard.stop - shard.start for shard in mine), unit=f" {rows.unit}",
        disable=not state.is_main_process, mininterval=1,
    ) as progress:  # fmt: skip
        for shard, embeddings, reasons in embed(rows, mine, tower, settings, device, dtype, progress):
            # first the list, so that a complete shard always has one
            write_failures(failures_path(extraction, shard), table[shard], reasons)
            extraction.write(shard, embeddings, np.array([not reason for reason in reasons]))
    if extraction.wait():
        finish(extraction, kind, workspace, settings.keep_shards)
        print(f"{path}: {len(table)} rows of width {tower.width} in {time.perf_counter() - started:.1f} s")


def failures_path(extraction: ShardedExtraction, shard: slice) -> Path:
    return extraction.folder / f"failures_{shard.start}_{shard.stop}.csv"


def write_failures(path: Path, rows: pd.DataFrame, reasons: list[str]) -> None:
    """The rows that have a reason, as csv: sample_id, image, reason."""
    failures = rows[["sample_id", "image"]].assign(reason=reasons)
    with atomic_write(path) as file:
        failures[failures["reason"] != ""].to_csv(file, index=False, lineterminator="\n")


def finish(extraction: ShardedExtraction, kind: str, workspace: Workspace, keep_shards: bool) -> None:
    """Join shards and failure lists, and say what could not be embedded."""
    name, split = extraction.meta["name"], extraction.meta["split"]
    failures = pd.concat([read_table(failures_path(extraction, shard)) for shard in extraction.shards])
    if kind == "image":
        with atomic_write(workspace.path("image_failures", name=name, split=split)) as file:
            failures.to_csv(file, index=False, lineterminator="\n")
    extraction.finish(keep_shards)
    counts = failures["reason"].str.replace(r" \(.*", "", regex=True).value_counts()
    if len(failures):
        listed = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        print(f"{name}: {len(failures)} rows without an embedding: {listed}")
    warn_of_other_encoder(extraction.meta, workspace)


def warn_of_other_encoder(meta: dict[str, Any], workspace: Workspace) -> None:
    """Train and test embeddings of two encoders are two languages, and no shape would tell."""
    for split in set(SPLITS) - {meta["split"]}:
        path = workspace.path("embeddings", name=meta["name"], split=split)
        sidecar = path.with_name(path.name + ".json")
        if sidecar.is_file() and read_json(sidecar).get("checkpoint") != meta["checkpoint"]:
            print(f"warning: {path} comes from another encoder; extract {split} again", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    settings, split = parse_settings(
        Settings, argv, description=__doc__.split("\n")[0], presets=PRESETS, positional={"split": SPLITS}
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    guard_torchvision()
    from accelerate import PartialState

    device = choose_device(settings.device)
    # the default time limits, 10 and 30 minutes, are shorter than a shard on a slow disk
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=1))
    for kind in ("image", "text") if settings.tower == "both" else (settings.tower,):
        extract(kind, split, settings, state, device)
    state.destroy_process_group()


if __name__ == "__main__":
    run_entry_point(main)
