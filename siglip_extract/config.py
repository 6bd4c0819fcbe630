"""Every default of siglip_extract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from contracts.errors import InputError
from contracts.workspace import REPOSITORY


@dataclass
class Settings:
    preset: Literal["base", "tiny"] = "base"
    """base: the published checkpoints. tiny: the same classes, small, with random weights; a demo and a test"""
    workspace: str = str(REPOSITORY)
    """folder with data/, checkpoints/ and predictions/"""
    tower: Literal["image", "text", "both"] = "both"
    """which tower to run; only its weights are loaded"""
    image_model: str = "google/siglip-so400m-patch14-384"
    """SigLIP checkpoint of the image tower (1152-d): hub id or local folder"""
    text_model: str = "google/siglip-large-patch16-384"
    """SigLIP checkpoint of the text tower (1024-d): hub id or local folder"""
    random_weights: bool = False
    """keep the architecture but draw the weights from --seed: nothing is downloaded"""
    batch_size: int = 64
    """pictures or texts a forward pass"""
    workers: int = 8
    """processes that decode pictures and tokenise texts; 0 does it in the main process"""
    shard_rows: int = 4096
    """rows a shard: what an interruption can cost, and the most rows held in memory"""
    keep_shards: bool = False
    """leave the result as shards, for a catalogue too large for one array"""
    storage: Literal["float16", "float32"] = "float16"
    """number format of the stored embeddings"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on CUDA and fp32 elsewhere"""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""
    seed: int = 0
    """seed of random weights"""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be at least 1")
        if self.workers < 0:
            raise InputError(f"--workers {self.workers}: must not be negative")


PRESETS = {
    "base": {},
    "tiny": {
        "image_model": "tiny",
        "text_model": "tiny",
        "random_weights": True,
        "batch_size": 128,
        "workers": 0,
    },
}
