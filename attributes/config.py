"""Settings of the stage: every default once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contracts.errors import InputError
from contracts.workspace import REPOSITORY

MAX_PICTURES = 5
"""Pictures of a listing that are looked at; further ones are left out."""
SIDE = 224
"""Pixels per side of every picture."""


@dataclass
class ListingSettings:
    """Where listings come from, and what of them the model reads."""

    workspace: Path = REPOSITORY
    """Folder that receives checkpoints/<run> and attributes/."""
    listings: str = "train"
    """Table of listings: a file (.csv, .tsv, .jsonl or .parquet), or the name of a prepared table of the workspace."""
    images: Path | None = None
    """Folder of the pictures; without it the folder of the table, or images/ beside it."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>."""

    def __post_init__(self) -> None:
        self.workspace = Path(self.workspace)
        self.images = None if self.images is None else Path(self.images)


@dataclass
class TrainingSettings(ListingSettings):
    """What SFT and DPO have in common."""

    batch_size: int = 8
    """Examples (SFT) or pairs (DPO) per step and process."""
    micro_batch: int = 8
    """Examples or pairs that are in memory at a time; a step adds up as many as it needs."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm than this are scaled down to it."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass: less memory, more time."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 elsewhere; the adapter is fp32 in any case."""
    checkpoint_steps: int = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Seeds the adapter's weights and the order of the examples."""
    resume: bool = False
    """Continue an interrupted run; a finished one is left as it is."""
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Tracker that receives the metrics as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "batch_size", "micro_batch", "checkpoint_steps")


@dataclass
class SftSettings(TrainingSettings):
    """Settings of train_sft.py."""

    preset: Literal["base", "tiny"] = "base"
    """base: a published checkpoint on a GPU; tiny: the model that attributes.sample_world trains."""
    run: str = "attributes_sft"
    """Name of the run folder in checkpoints/."""
    labels: Path = Path("labels.csv")
    """Table sample_id, attribute, value and, where there is one, reasoning: the labels to learn from."""
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Vision-language model: hub id or local folder; Qwen2.5-VL and Qwen2-VL."""
    schema: str = "grocery_store"
    """Attributes to learn: a yaml file, or the name of one in attributes/schemas."""
    input: Literal["pictures", "text", "both"] = "both"
    """What the model reads of a listing."""
    fit: Literal["pad", "stretch"] = "pad"
    """How a picture becomes a square of 224 pixels: white bars, or another aspect."""
    text_tokens: int = 512
    """Most tokens of a listing's text."""
    reasoning: bool = True
    """Reason before the answer; --no-reasoning answers at once."""
    lora_rank: int = 32
    """Rank of the adapters on the query and value projections of the language model."""
    lora_alpha: int = 32
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    epochs: int = 10
    """Passes over the labels."""
    lr: float = 1e-4
    """Peak learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = Path(self.labels)
        require_positive(self, "lora_rank", "lora_alpha", "epochs", "lr", "text_tokens")


@dataclass
class DpoSettings(TrainingSettings):
    """Settings of train_dpo.py."""

    preset: Literal["base", "tiny"] = "base"
    """base: the paper's values; tiny: for the model that attributes.sample_world trains."""
    sft: str = "attributes_sft"
    """Run that sampled the chains: the policy to start from and, frozen, the reference."""
    run: str = "attributes_dpo"
    """Name of the run folder in checkpoints/."""
    objective: Literal["dpo", "self_learning"] = "dpo"
    """dpo: preferred against dispreferred chains; self_learning: SFT on the preferred chains alone."""
    min_consistency: float = 0.5
    """Listings whose chains agree less than this give no pair."""
    unanimous: Literal["drop", "sft"] = "drop"
    """Listings whose chains all agree give no pair. sft: one of their chains is learned as in SFT."""
    sft_weight: float = 1.0
    """Weight of the loss of --unanimous sft, per example, beside a pair's loss."""
    weight: Literal["none", "confidence"] = "none"
    """confidence: a pair counts as much as its listing's chains agree."""
    beta: float = 0.2
    """Inverse temperature of DPO: how firmly the policy is held to the reference."""
    round: int = 0
    """Round of sampling whose chains are used."""
    epochs: int = 1
    """Passes over the pairs."""
    max_steps: int = 0
    """Steps after which training ends; 0 ends with the epochs. Further passes are added where it needs them."""
    lr: float = 1e-5
    """Peak learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta", "epochs", "lr", "sft_weight")
        require_share(self, "min_consistency")
        if self.objective == "self_learning" and self.unanimous == "sft":
            raise InputError(
                "--unanimous sft: self_learning learns unanimous listings in any case; leave it out"
            )


@dataclass
class SamplingSettings(ListingSettings):
    """How chains are drawn."""

    run: str = "attributes_sft"
    """Finished run of train_sft or train_dpo."""
    chains: int = 7
    """Chains per listing and attribute."""
    temperature: float = 1.0
    """Temperature of the distribution that tokens are drawn from."""
    max_new_tokens: int = 256
    """Tokens after which a chain counts as truncated."""
    batch_size: int = 8
    """Prompts per forward pass; each has `chains` chains."""
    shard_listings: int = 256
    """Listings per file; an interrupted run continues after the last complete file."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 elsewhere."""
    round: int = 0
    """Number of this sampling; each has random numbers of its own."""
    seed: int = 0
    """Seed of the random numbers, beside sample_id, attribute and round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "chains", "temperature", "max_new_tokens", "batch_size", "shard_listings")


@dataclass
class SampleSettings(SamplingSettings):
    """Settings of sample_chains.py."""

    labels: tuple[Path, ...] = ()
    """Label files whose listings are left out, such as those of calibration and test; those of SFT always are."""


@dataclass
class EvaluateSettings(SamplingSettings):
    """Settings of evaluate.py."""

    labels: Path = Path("test_labels.csv")
    """Labels to score on."""
    calibration_labels: Path | None = None
    """Labels that the calibration is fitted on; without them, consistency is what confidence is."""
    calibration_listings: str = ""
    """Table of those listings, where it is another than that of the test."""
    resamples: int = 1000
    """Bootstrap resamples of the listings, for 95 % intervals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = Path(self.labels)
        self.calibration_labels = None if self.calibration_labels is None else Path(self.calibration_labels)
        require_positive(self, "resamples")


@dataclass
class ExtractSettings(SamplingSettings):
    """Settings of extract_attributes.py."""

    min_consistency: float = 0.5
    """Below this share of the chains the answer is withheld."""
    gallery: int = 24
    """Listings on the page attributes/gallery_<table>.html; 0 writes none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, "min_consistency")


TINY_SFT: dict[str, Any] = {
    "lora_rank": 16, "lora_alpha": 32, "epochs": 40, "lr": 5e-3, "batch_size": 16, "micro_batch": 16,
    "text_tokens": 64,
}  # fmt: skip
TINY_DPO: dict[str, Any] = {"lr": 2e-3, "batch_size": 16, "micro_batch": 16}
SFT_PRESETS: dict[str, dict[str, Any]] = {"base": {}, "tiny": TINY_SFT}
DPO_PRESETS: dict[str, dict[str, Any]] = {"base": {}, "tiny": TINY_DPO}


def require_positive(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be above 0")


def require_share(settings: Any, name: str) -> None:
    if not 0 <= getattr(settings, name) <= 1:
        raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must lie in [0, 1]")
