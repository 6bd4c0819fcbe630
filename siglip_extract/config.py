"""Every setting of this stage with its default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contracts.errors import InputError
from contracts.workspace import REPOSITORY


@dataclass
class Settings:
    """Settings of extract_embeddings.py. The defaults are the preset `base`, meant for a GPU."""

    preset: Literal["base", "tiny"] = "base"
    """base: the published checkpoints; tiny: the same classes, small and with random weights, for demo and tests"""
    workspace: Path = REPOSITORY
    """folder that holds data/, checkpoints/ and predictions/"""
    tower: Literal["image", "text", "both"] = "both"
    """which tower to run; only its weights are loaded"""
    image_model: str = "google/siglip-so400m-patch14-384"
    """SigLIP checkpoint of the image tower (1152-d): hub id or local folder"""
    text_model: str = "google/siglip-large-patch16-384"
    """SigLIP checkpoint of the text tower (1024-d): hub id or local folder"""
    random_weights: bool = False
    """keep the architecture but draw the weights from --seed, so that nothing is downloaded"""
    batch_size: int = 64
    """pictures or texts per forward pass"""
    workers: int = 8
    """processes per encoding process that decode pictures or tokenise texts; 0 does it in the encoding process"""
    shard_rows: int = 4096
    """rows per shard: an interruption costs at most one shard, and only one is held in memory"""
    keep_shards: bool = False
    """leave the embeddings in shards, for a catalogue too large for one array"""
    storage: Literal["float16", "float32"] = "float16"
    """number format of the stored embeddings"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on CUDA and fp32 elsewhere"""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>"""
    seed: int = 0
    """seed of random weights"""

    def __post_init__(self) -> None:
        self.workspace = Path(self.workspace)
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be at least 1")
        if self.workers < 0:
            raise InputError(f"--workers {self.workers}: must be 0 or more")


PRESETS = {
    "base": {},
    "tiny": {
        "image_model": "tiny", "text_model": "tiny", "random_weights": True, "batch_size": 128, "workers": 0,
    },
}  # fmt: skip
