"""Both image encoders in one pass: every picture is read and decoded once.

    python -m pipeline.extract_images train                  # clip_image_train.pkl and siglip_image_train.pkl
    python -m pipeline.extract_images new                    # any table that data.prepare has made
    python -m pipeline.extract_images test --preset tiny
    torchrun --nproc_per_node=4 -m pipeline.extract_images train

This writes what `clip_finetune.extract_embeddings` and `siglip_extract.extract_embeddings --tower image` write, with
their own functions, and continues from the shards of either. The picture is decoded at the scale that the larger of
the two inputs needs, and averaged down for the other one where that is less than half as large: 1000 pixels become 500
for SigLIP's 384 and 250 for CLIP's 224. When CLIP's stage runs alone, the JPEG decoder does this averaging; the two
embeddings then differ slightly, by less than either differs from that of a full decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

import clip_finetune.extract_embeddings as clip_stage
import siglip_extract.extract_embeddings as siglip_stage
from clip_finetune.config import ExtractSettings as ClipExtractSettings
from clip_finetune.encoder import Encoder as ClipEncoder
from contracts.errors import run_entry_point
from contracts.workspace import REPOSITORY, Workspace
from siglip_extract.config import Settings as SiglipSettings
from training.device import build_accelerator, choose_device, guard_torchvision
from training.extraction import BatchEncoder, ShardedExtraction, embed_shards, file_meta
from training.pictures import PictureRows
from training.settings import parse_settings

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from accelerate import Accelerator

    from clip_finetune.model import PriceClip
    from siglip_extract.model import Tower


@dataclass
class ExtractImagesSettings:
    """Settings of both encoders; those of CLIP's model come from its run."""

    preset: Literal["base", "tiny"] = "base"
    """base: the published SigLIP tower; tiny: a small one with random weights. CLIP is the one that its run trained"""
    workspace: Path = REPOSITORY
    """folder that holds data/, checkpoints/ and predictions/"""
    run: str = ClipExtractSettings.run
    """finished run of clip_finetune in checkpoints/"""
    image_model: str = SiglipSettings.image_model
    """SigLIP checkpoint of the image tower: hub id or local folder"""
    random_weights: bool = False
    """keep SigLIP's architecture but draw its weights from --seed"""
    batch_size: int = 128
    """pictures per forward pass of either encoder"""
    workers: int = 8
    """processes per encoding process that decode pictures; 0 decodes in the encoding process itself"""
    shard_rows: int = 4096
    """rows per shard: an interrupted extraction continues with the shards that are missing"""
    storage: Literal["float16", "float32"] = SiglipSettings.storage
    """number format of the stored SigLIP embeddings"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on CUDA and fp32 elsewhere"""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>"""
    seed: int = SiglipSettings.seed
    """seed of random weights"""

    def __post_init__(self) -> None:
        self.workspace = Path(self.workspace)

    def of_siglip(self) -> SiglipSettings:
        names = (
            "preset", "workspace", "image_model", "random_weights", "batch_size", "workers", "shard_rows", "storage",
            "precision", "device", "seed",
        )  # fmt: skip
        return SiglipSettings(**{name: getattr(self, name) for name in names}, tower="image")


PRESETS = {"base": {}, "tiny": {"image_model": "tiny", "random_weights": True, "workers": 0}}


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """Average the picture over whole pixels, as a decode at a smaller scale does, down to a shorter side >= `side`.

    The bicubic resize that follows takes time by the pixels that it reads. Without this step it would cost most of
    what decoding once saves.
    """
    factor = min(picture.size) // side
    return picture.reduce(factor) if factor > 1 else picture


class BothInputs:
    """Makes CLIP's and SigLIP's input of one decoded picture: a pair of (3, S, S), float32 and uint8."""

    def __init__(self, clip: PriceClip, tower: Tower):
        self.clip_side = clip.side
        self.clip_prepare = clip.transform()
        self.siglip_side = tower.picture_size
        self.siglip_prepare = tower.prepare

    @property
    def min_side(self) -> int:
        """The scale of decoding that both need."""
        return max(self.clip_side, self.siglip_side)

    def __call__(self, picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        clip = self.clip_prepare(shrunk(picture, self.clip_side))
        siglip = self.siglip_prepare(shrunk(picture, self.siglip_side))
        return clip, siglip


@dataclass
class Job:
    """One encoder, the file that it fills, and the shards that this process has to write into it."""

    encoder: BatchEncoder
    file: ShardedExtraction
    storage: str
    pending: list[slice]

    @classmethod
    def start(
        cls,
        encoder: BatchEncoder,
        meta: dict[str, Any],
        table: pd.DataFrame,
        storage: str,
        settings: ExtractImagesSettings,
    ) -> Job:
        path = Workspace(settings.workspace).path("embeddings", name=meta["name"], split=meta["split"])
        file = ShardedExtraction(path, table["sample_id"].to_numpy(), meta, settings.shard_rows)
        return cls(encoder, file, storage, file.pending())

    def write(self, rows: slice, embeddings: np.ndarray, valid: np.ndarray, reasons: list[str]) -> None:
        if rows in self.pending:
            self.file.write(rows, embeddings.astype(self.storage), valid, reasons)


def extract(settings: ExtractImagesSettings, split: str, accelerator: Accelerator) -> None:
    """Fill the shards that either file lacks, and join them.

    Raises:
        InputError: no finished CLIP run, or no SigLIP checkpoint.
    """
    workspace = Workspace(settings.workspace)
    table = workspace.prepared(split)
    clip = ClipEncoder.open(
        workspace.path("run", name=settings.run), device=settings.device, precision=settings.precision
    )
    with accelerator.main_process_first():  # one process downloads the checkpoint
        siglip = siglip_stage.open_encoder("image", settings.of_siglip())

    both = BothInputs(clip.model, siglip.tower)
    pictures = PictureRows(table["image"], workspace.images_folder(), both, min_side=both.min_side)
    inputs = pictures.identity()
    clip_meta = file_meta(clip.meta, workspace, split, inputs)
    siglip_meta = file_meta(siglip.meta, workspace, split, inputs)
    jobs = [
        Job.start(clip, clip_meta, table, "float32", settings),
        Job.start(siglip, siglip_meta, table, siglip.storage, settings),
    ]

    # both files have the same shards, but an interruption may have left one file behind the other
    shards = [rows for rows in jobs[0].file.shards if any(rows in job.pending for job in jobs)]
    embedded = embed_shards(
        shards,
        pictures,
        [job.encoder for job in jobs],
        batch_size=settings.batch_size,
        workers=settings.workers,
        device=clip.device,
        description=f"images {split}",
        quiet=not accelerator.is_main_process,
    )
    for shard in embedded:
        for job, embeddings in zip(jobs, shard.embeddings, strict=True):
            job.write(shard.rows, embeddings, shard.valid, shard.reasons)

    clip_job, siglip_job = jobs
    if clip_job.file.wait():
        clip_stage.finish(clip_job.file, workspace, table, clip)
    if siglip_job.file.wait():
        siglip_stage.finish(siglip_job.file, workspace, table)


def main(argv: list[str] | None = None) -> None:
    settings, split = parse_settings(
        ExtractImagesSettings, argv, description=__doc__.split("\n")[0], presets=PRESETS,
        positional={"table": None},
    )  # fmt: skip
    guard_torchvision()
    # torch's own limits on waiting, 10 and 30 minutes, are shorter than a large download
    accelerator = build_accelerator(
        choose_device(settings.device), settings.precision, timeout=timedelta(days=1)
    )
    extract(settings, split, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_entry_point(main)
