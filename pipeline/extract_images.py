"""Both image encoders in one pass: every picture is read and decoded once.

    python -m pipeline.extract_images train                  # clip_image_train.pkl and siglip_image_train.pkl
    python -m pipeline.extract_images test --preset tiny
    torchrun --nproc_per_node=4 -m pipeline.extract_images train

Writes what `clip_finetune.extract_embeddings` and `siglip_extract.extract_embeddings --tower image` write, with their
own functions, and goes on from the shards of either. The picture is decoded for the larger of the two inputs, and
averaged down for the other where that is less than half as large (1000 pixels: 500 for SigLIP's 384, 250 for CLIP's
224). CLIP alone has the JPEG decoder do that; its embeddings then differ a little, by less than from a full decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

import clip_finetune.extract_embeddings as clip_stage
import siglip_extract.extract_embeddings as siglip_stage
from clip_finetune.config import ClipSettings
from clip_finetune.config import ExtractSettings as ClipExtractSettings
from contracts.errors import run_entry_point
from contracts.workspace import REPOSITORY, SPLITS, Workspace
from siglip_extract.config import Settings as SiglipSettings
from training.device import choose_device, choose_dtype, guard_torchvision, mixed_precision
from training.extraction import ShardedExtraction
from training.pictures import open_picture
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

    from clip_finetune.model import PriceClip
    from siglip_extract.model import Tower

    Batch = tuple[torch.Tensor, torch.Tensor, list[str]]


@dataclass
class ExtractImagesSettings:
    preset: Literal["base", "tiny"] = "base"
    """base: the published SigLIP tower; tiny: a small one with random weights. CLIP is what its run trained"""
    workspace: Path = REPOSITORY
    """folder with data/, checkpoints/ and predictions/"""
    run: str = ClipExtractSettings.run
    """finished run of clip_finetune in checkpoints/"""
    image_model: str = SiglipSettings.image_model
    """SigLIP checkpoint of the image tower: hub id or local folder"""
    random_weights: bool = False
    """keep SigLIP's architecture but draw its weights from --seed"""
    batch_size: int = 128
    """pictures a forward pass of either encoder"""
    workers: int = 8
    """processes that decode pictures, for each encoding process; 0 decodes in the main process"""
    shard_rows: int = 4096
    """rows a resumable shard"""
    storage: Literal["float16", "float32"] = SiglipSettings.storage
    """number format of the stored SigLIP embeddings"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on CUDA and fp32 elsewhere"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    seed: int = SiglipSettings.seed
    """seed of random weights"""

    def of_clip(self) -> ClipExtractSettings:
        names = ("workspace", "run", "batch_size", "shard_rows", "precision", "device", "workers")
        return ClipExtractSettings(**{name: getattr(self, name) for name in names})

    def of_siglip(self) -> SiglipSettings:
        names = (
            "preset", "image_model", "random_weights", "batch_size", "workers", "shard_rows", "storage", "precision",
            "device", "seed",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        return SiglipSettings(**values, workspace=str(self.workspace), tower="image")


PRESETS = {"base": {}, "tiny": {"image_model": "tiny", "random_weights": True, "workers": 0}}


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """`picture` averaged over whole pixels while its shorter side stays at least `side`: what a coarser decode gives.

    The bicubic resize that follows takes time by the pixels it reads, and would lose most of what one decode saves.
    """
    factor = min(picture.size) // side
    return picture.reduce(factor) if factor > 1 else picture


class BothInputs(siglip_stage.Pictures):
    """SigLIP's rows, with CLIP's input made from the same decoded picture.

    An item is ((CLIP's pixels, SigLIP's pixels), "") or (None, why there are none).
    """

    read = staticmethod(open_picture)  # CLIP's transform takes a picture, not pixels

    def __init__(self, table: pd.DataFrame, folder: Path, clip: PriceClip, tower: Tower):
        super().__init__(table, folder, tower)
        self.sides, self.transforms = (clip.side, tower.picture_size), (clip.transform(), tower.prepare)
        self.size, self.prepare = max(self.sides), self._prepare_both

    def _prepare_both(self, picture: Image.Image) -> tuple[torch.Tensor, ...]:
        both = zip(self.transforms, self.sides, strict=True)
        return tuple(transform(shrunk(picture, side)) for transform, side in both)

    @staticmethod
    def collate(items: list[tuple[tuple[torch.Tensor, torch.Tensor] | None, str]]) -> Batch:
        """CLIP's and SigLIP's pixels of the usable rows, and a reason or "" for every row."""
        import torch

        usable = [pixels for pixels, _ in items if pixels is not None]
        clip, siglip = (
            torch.stack([pixels[encoder] for pixels in usable]) if usable else torch.empty(0)
            for encoder in (0, 1)
        )
        return clip, siglip, [reason for _, reason in items]


class Encoders:
    """Both models on their device, and the files they are to fill.

    Raises:
        InputError: no finished CLIP run, or no SigLIP checkpoint.
    """

    def __init__(self, settings: ExtractImagesSettings, split: str):
        from accelerate import Accelerator

        from clip_finetune.model import load_model

        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.precision, self.device)
        precision = mixed_precision(settings.precision, self.device)
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision=precision)
        self.workspace = Workspace(settings.workspace)
        self.table = self.workspace.prepared(split)
        self.run = RunFolder.finished(self.workspace.path("run", name=settings.run), "clip_finetune")
        self.clip = load_model(self.run.path)
        of_siglip, of_clip = settings.of_siglip(), settings.of_clip()
        with self.accelerator.main_process_first():  # one process downloads the checkpoint
            self.tower = siglip_stage.load_tower("image", of_siglip)
        self.rows = BothInputs(self.table, self.workspace.images_folder(), self.clip, self.tower)

        clip_meta = clip_stage.embedding_meta(of_clip, split, self.run, self.run.settings(ClipSettings))
        siglip_meta = siglip_stage.describe("image", split, self.tower, self.rows, of_siglip, self.dtype)
        self.clip_file, self.siglip_file = (
            ShardedExtraction(
                self.workspace.path("embeddings", name=meta["name"], split=split),
                self.table["sample_id"].to_numpy(), meta, settings.shard_rows,
            )
            for meta in (clip_meta, siglip_meta)
        )  # fmt: skip
        self.clip.to(self.device)
        self.tower.model.to(self.device)

    def encode_shard(
        self, batches: Iterator[Batch], n_rows: int, storage: str, progress: tqdm
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """CLIP's (n, D_in) float32 and SigLIP's (n, D_in) embeddings of one shard, and n reasons or ""."""
        clip = np.zeros((n_rows, self.clip.width), np.float32)
        siglip, reasons = np.zeros((n_rows, self.tower.width), storage), []
        for clip_pixels, siglip_pixels, of_batch in batches:
            usable = [len(reasons) + row for row, reason in enumerate(of_batch) if not reason]
            if usable:
                clip[usable] = clip_stage.encode(self.clip, clip_pixels, self.accelerator)
                siglip[usable] = siglip_stage.encode(
                    self.tower, {"pixel_values": siglip_pixels}, self.device, self.dtype
                )
            reasons += of_batch
            progress.update(len(of_batch))
        return clip, siglip, reasons

    def finish(self) -> None:
        if self.clip_file.wait():
            clip_stage.finish(self.clip_file, self.run, self.workspace, self.table, self.clip)
        if self.siglip_file.wait():
            siglip_stage.finish(self.siglip_file, "image", self.workspace, keep_shards=False)


def load(rows: BothInputs, batches: list[range], workers: int, device: torch.device) -> DataLoader:
    """What `BothInputs.collate` makes of the given batches of rows, in that order."""
    from torch.utils.data import DataLoader

    return DataLoader(
        rows, batch_sampler=batches, collate_fn=rows.collate, num_workers=min(workers, len(batches)),
        pin_memory=device.type == "cuda",
    )  # fmt: skip


def extract(settings: ExtractImagesSettings, split: str) -> None:
    """Fill the shards that either file lacks, and join them."""
    both = Encoders(settings, split)
    of_clip, of_siglip = both.clip_file.pending(), both.siglip_file.pending()
    shards = sorted(of_clip + [s for s in of_siglip if s not in of_clip], key=lambda shard: shard.start)
    batches = [
        [range(start, min(start + settings.batch_size, shard.stop))
         for start in range(shard.start, shard.stop, settings.batch_size)]
        for shard in shards
    ]  # fmt: skip
    loaded = iter(load(both.rows, list(chain.from_iterable(batches)), settings.workers, both.device))
    with tqdm(
        total=sum(shard.stop - shard.start for shard in shards), desc=f"images {split}", unit="row",
        disable=not both.accelerator.is_main_process,
    ) as progress:  # fmt: skip
        for shard, of_shard in zip(shards, batches, strict=True):
            part = islice(loaded, len(of_shard))
            clip, siglip, reasons = both.encode_shard(
                part, shard.stop - shard.start, settings.storage, progress
            )
            valid = np.array([not reason for reason in reasons])
            if shard in of_clip:
                both.clip_file.write(shard, clip, valid)
            if shard in of_siglip:
                failures = siglip_stage.failures_path(both.siglip_file, shard)
                siglip_stage.write_failures(failures, both.table[shard], reasons)
                both.siglip_file.write(shard, siglip, valid)
    both.finish()
    both.accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    settings, split = parse_settings(
        ExtractImagesSettings, argv, description=__doc__.split("\n")[0], presets=PRESETS,
        positional={"split": SPLITS},
    )  # fmt: skip
    guard_torchvision()
    extract(settings, split)


if __name__ == "__main__":
    run_entry_point(main)
