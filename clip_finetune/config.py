"""Every setting of this stage, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contracts.errors import InputError
from contracts.splits import roles
from contracts.workspace import REPOSITORY


@dataclass
class ClipSettings:
    """Settings of train.py. The defaults are the preset `base`, meant for one A100 or H100."""

    workspace: Path = REPOSITORY
    """folder that holds data/, checkpoints/ and predictions/"""
    preset: Literal["base", "tiny"] = "base"
    """base: the real CLIP; tiny: the same class, small and random, for the demo and the tests"""
    run: str = "clip_finetune"
    """name of the run folder in checkpoints/"""
    holdout: int | None = 0
    """which fifth of the folds is only validated on, 0 to 4; null fits on nine folds, for a final model"""

    # the name with -quickgelu: OpenAI trained with that activation, and with the plain name open_clip only warns
    model: str = "ViT-L-14-quickgelu"
    """open_clip architecture, hub id (org/name) or local folder with open_clip_config.json; tiny: the tiny one"""
    pretrained: str = "openai"
    """weights for an architecture: a tag of open_clip.list_pretrained() or a local file"""
    random_weights: bool = False
    """start from random weights instead of pretrained ones: nothing is downloaded"""

    epochs: int = 5
    """passes over the training pictures"""
    batch_size: int = 256
    """pictures a process encodes at a time"""
    grad_accum: int = 2
    """such batches a step; all of them, on all processes, are each other's negatives"""
    lr: float = 1e-5
    """peak learning rate of the projections; block j from the top gets lr * layer_decay**j"""
    head_lr: float = 1e-3
    """peak learning rate of the price head, which always starts from random weights"""
    layer_decay: float = 0.85
    """how much slower each deeper block learns; 1 treats all alike"""
    weight_decay: float = 0.05
    """AdamW's, on matrices only"""
    warmup: float = 0.1
    """part of all steps over which the learning rate rises; it then falls along a cosine to 0"""
    grad_clip: float = 1.0
    """largest norm of the gradient"""
    unfreeze_blocks: int = 6
    """top blocks of each tower that train from the first epoch; 0: only the projections and the price head"""
    unfreeze_per_epoch: int = 6
    """further blocks that join at every later epoch; the embeddings join after the lowest block"""
    price_weight: float = 1.0
    """weight of the price loss beside the contrastive loss; 0 switches the price part off"""
    price_loss: Literal["huber", "smape"] = "huber"
    """huber: on log_price, delta 1; smape: the metric itself, 2 tanh(|ln p - ln a| / 2)"""
    grad_checkpointing: bool = True
    """recompute activations in the backward pass: about a third slower, several times less memory"""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 autocast on CUDA and fp32 elsewhere"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    workers: int = 8
    """processes that decode pictures, for each training process; 0 decodes in the training process"""
    seed: int = 0
    """for the initial weights and, with the epoch, for the order of the pictures"""
    resume: bool = False
    """continue this run from its newest complete checkpoint"""
    checkpoint_steps: int = 500
    """steps between checkpoints within an epoch; every epoch ends with one; 0: only those"""
    report_to: Literal["none", "tensorboard"] = "none"
    """tensorboard also writes event files into the run folder"""

    def __post_init__(self) -> None:
        self.workspace = Path(self.workspace)
        roles(self.holdout)  # refuses a number that is not 0 to 4
        _require(self, "batch_size", self.batch_size >= 2, "at least 2: one pair alone has no negative")
        for name in ("epochs", "grad_accum"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "head_lr", "grad_clip"):
            _require(self, name, getattr(self, name) > 0, "above 0")
        for name in ("unfreeze_blocks", "unfreeze_per_epoch", "price_weight", "weight_decay", "workers"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        _require(self, "seed", 0 <= self.seed < 2**32, "0 or more and below 2**32")
        _require(self, "checkpoint_steps", self.checkpoint_steps >= 0, "0 or more")
        _require(self, "warmup", 0 <= self.warmup < 1, "0 or more and below 1")
        _require(self, "layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")
        _require(self, "run", self.run == Path(self.run).name and self.run != "", "a plain folder name")


PRESETS = {
    "base": {},
    "tiny": {
        "model": "tiny", "pretrained": "", "epochs": 8, "batch_size": 64, "grad_accum": 1, "workers": 0,
        "lr": 1e-3, "layer_decay": 1.0, "unfreeze_blocks": 100, "grad_checkpointing": False,
    },
}  # fmt: skip


@dataclass
class ExtractSettings:
    """Settings of extract_embeddings.py; what concerns the model comes from the run."""

    workspace: Path = REPOSITORY
    """folder that holds data/, checkpoints/ and predictions/"""
    run: str = "clip_finetune"
    """name of the run folder in checkpoints/"""
    name: str = "clip_image"
    """name of the embedding file: data/embeddings/<name>_<split>.pkl"""
    batch_size: int | None = None
    """pictures encoded at a time; null: as in training"""
    shard_rows: int = 4096
    """rows a resumable shard"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 autocast on CUDA and fp32 elsewhere"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    workers: int | None = None
    """processes that decode pictures, for each encoding process; null: as in training"""

    def __post_init__(self) -> None:
        self.workspace = Path(self.workspace)
        _require(self, "shard_rows", self.shard_rows >= 1, "at least 1")
        _require(self, "batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1")
        _require(self, "workers", self.workers is None or self.workers >= 0, "0 or more")


def _require(settings: object, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be {wanted}")
