"""Every setting of this stage with its default."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from contracts.errors import InputError
from contracts.splits import N_HOLDOUTS, Roles, roles
from contracts.workspace import CLIP_IMAGE, REPOSITORY
from training.run_folder import part_folder
from training.trackers import ReportTo


@dataclass
class ClipSettings:
    """Settings of train.py. The defaults are the preset `base`, meant for one A100 or H100."""

    RENAMED: ClassVar[dict[str, str | None]] = {
        "grad_accum": "gradient_accumulation_steps",
        "grad_checkpointing": "gradient_checkpointing",
        "grad_clip": "max_grad_norm",
        "warmup": "warmup_ratio",
    }

    workspace: Path = REPOSITORY
    """folder that holds data/, checkpoints/ and predictions/"""
    preset: Literal["base", "tiny"] = "base"
    """base: the published CLIP; tiny: the same class, small and with random weights, for the demo and the tests"""
    run: str = "clip_finetune"
    """name of the run folder in checkpoints/"""
    holdout: int | None = 0
    """hold-out, 0 to 4: two of the ten folds that are only validated on; null validates on none, for a final model"""
    folds: int = 0
    """0 trains one model; 2, 5 or 10 trains out of fold: that many models, each without the rows that it embeds later,
    and one on all rows, which embeds every other table"""

    # OpenAI trained with QuickGELU; given its weights under the plain name, open_clip only warns
    model: str = "ViT-L-14-quickgelu"
    """open_clip architecture, hub id (org/name), local folder with open_clip_config.json, or tiny"""
    pretrained: str = "openai"
    """weights for an open_clip architecture: a tag of open_clip.list_pretrained() or a local file"""
    random_weights: bool = False
    """start from random weights instead of pretrained ones, so that nothing is downloaded"""

    epochs: int = 5
    """passes over the training pictures"""
    batch_size: int = 256
    """micro-batch size: pairs of picture and text per process and forward pass"""
    gradient_accumulation_steps: int = 2
    """micro-batches accumulated per step; every pair in the step, on every process, serves as a negative"""
    lr: float = 1e-5
    """peak learning rate of the projections; that of block j from the top is lr * layer_decay**j"""
    head_lr: float = 1e-3
    """peak learning rate of the price head, which always starts from random weights"""
    layer_decay: float = 0.85
    """factor on the learning rate from one block to the next deeper one; 1 gives all blocks the same rate"""
    weight_decay: float = 0.05
    """weight decay of AdamW, applied to matrices only"""
    warmup_ratio: float = 0.1
    """share of all steps over which the learning rate rises; after that it falls along a cosine to 0"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm where it is larger"""
    unfreeze_blocks: int = 6
    """blocks from the top of each tower that train from the first epoch; 0 trains the projections and the price head"""
    unfreeze_per_epoch: int = 6
    """blocks that are unfrozen at each later epoch; the embeddings follow after the lowest block"""
    price_weight: float = 1.0
    """weight of the price loss beside the contrastive loss; 0 leaves out the price head"""
    price_loss: Literal["huber", "smape"] = "huber"
    """huber: Huber with delta 1 on log1p(price); smape: the metric itself as a fraction, 0 to 2"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass: about a third slower, with several times less memory"""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 autocast on CUDA and fp32 elsewhere"""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>"""
    workers: int = 8
    """processes per training process that decode pictures; 0 decodes in the training process itself"""
    seed: int = 0
    """seed of the initial weights and, together with the epoch, of the order of the pictures"""
    resume: bool = False
    """continue this run from its newest complete checkpoint"""
    checkpoint_steps: int = 500
    """steps between checkpoints within an epoch; 0 writes them only at the end of each epoch"""
    report_to: ReportTo = "none"
    """tracker that also receives settings and metrics; wandb and mlflow are packages to install"""

    def __post_init__(self) -> None:
        self.workspace = Path(self.workspace)
        roles(0, self.n_holdouts)  # raises unless ten folds can be dealt into that many hold-outs
        roles(self.holdout, self.n_holdouts)  # raises for a hold-out that does not exist
        _require(self, "batch_size", self.batch_size >= 2, "at least 2: one pair alone has no negative")
        for name in ("epochs", "gradient_accumulation_steps"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "head_lr", "max_grad_norm"):
            _require(self, name, getattr(self, name) > 0, "above 0")
        for name in ("unfreeze_blocks", "unfreeze_per_epoch", "price_weight", "weight_decay", "workers"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        _require(self, "seed", 0 <= self.seed < 2**32, "0 or more and below 2**32")
        _require(self, "checkpoint_steps", self.checkpoint_steps >= 0, "0 or more")
        _require(self, "warmup_ratio", 0 <= self.warmup_ratio < 1, "0 or more and below 1")
        _require(self, "layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")
        # one model of an out-of-fold run is called such as oof/fold_0
        folder = self.run.removesuffix(f"/{part_folder(self.holdout)}") if self.folds else self.run
        _require(self, "run", folder == Path(folder).name and folder != "", "a plain folder name")

    @property
    def n_holdouts(self) -> int:
        """Into how many hold-outs the ten folds are dealt."""
        return self.folds or N_HOLDOUTS

    @property
    def roles(self) -> Roles:
        """The folds that this run fits, stops on and validates."""
        return roles(self.holdout, self.n_holdouts)

    def parts(self) -> list[ClipSettings]:
        """The settings of each model of an out-of-fold run: one per hold-out, then the one of all rows."""
        parts = []
        for holdout in [*range(self.folds), None]:
            parts.append(replace(self, run=f"{self.run}/{part_folder(holdout)}", holdout=holdout))
        return parts


PRESETS = {
    "base": {},
    "tiny": {
        "model": "tiny", "pretrained": "", "epochs": 8, "batch_size": 64, "gradient_accumulation_steps": 1,
        "workers": 0, "lr": 1e-3, "layer_decay": 1.0, "unfreeze_blocks": 100, "gradient_checkpointing": False,
    },
}  # fmt: skip


@dataclass
class ExtractSettings:
    """Settings of extract_embeddings.py; those of the model come from the run."""

    workspace: Path = REPOSITORY
    """folder that holds data/, checkpoints/ and predictions/"""
    run: str = "clip_finetune"
    """name of the run folder in checkpoints/"""
    embedding: str = CLIP_IMAGE
    """name of the embedding file: data/embeddings/<embedding>_<table>.pkl"""
    batch_size: int | None = None
    """pictures per forward pass; null takes the value of the run"""
    shard_rows: int = 4096
    """rows per shard: an interrupted extraction continues with the shards that are missing"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 autocast on CUDA and fp32 elsewhere"""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>"""
    workers: int | None = None
    """processes per encoding process that decode pictures; null takes the value of the run"""

    def __post_init__(self) -> None:
        self.workspace = Path(self.workspace)
        _require(self, "shard_rows", self.shard_rows >= 1, "at least 1")
        _require(self, "batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1")
        _require(self, "workers", self.workers is None or self.workers >= 0, "0 or more")


def _require(settings: object, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be {wanted}")
