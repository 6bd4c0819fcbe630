"""Settings of the stage: every default once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contracts.errors import InputError
from contracts.splits import N_HOLDOUTS, roles
from contracts.workspace import REPOSITORY

Design = Literal["concat", "gate", "moe", "cross_attention", "text", "tabular"]
"""How text and fields meet; text and tabular are the two sides alone. text_tabular/model.py has a class for each."""


@dataclass
class TextTabularSettings:
    preset: Literal["base", "tiny"] = "base"
    """base: a pretrained encoder; tiny: a small encoder with random weights and a vocabulary of its own texts."""
    train: Path = Path("train.csv")
    """Table with texts, fields and labels: .csv, .tsv, .jsonl (each also .gz) or .parquet."""
    columns: Path = Path("columns.yaml")
    """Yaml file that says which column is which; the README shows one."""
    skip_unlabelled: bool = False
    """Leave out rows whose target is empty, instead of refusing the table."""
    workspace: Path = REPOSITORY
    """Folder that receives checkpoints/<run>."""
    run: str = "text_tabular"
    """Name of the run folder in checkpoints/."""
    design: Design = "gate"
    """How text and fields meet; text and tabular use one side alone."""
    fields_as_text: bool = False
    """Write the fields behind the text as words: the baseline that reads everything as text."""
    model: str = "bert-base-uncased"
    """Text encoder: hub id or local folder."""
    random_weights: bool = False
    """Start the encoder from random weights, of the shape that --model names, or of a small BERT in preset tiny."""
    tuning: Literal["full", "lora", "head"] = "full"
    """What is trained of the encoder: all of it, LoRA adapters, or nothing."""
    lora_rank: int = 16
    """Rank of the LoRA adapters, which are added to every linear layer of the encoder."""
    frozen_layers: int = 0
    """Lower layers of the encoder that keep their weights, and with them its word embeddings."""
    pooling: Literal["mean", "pooler"] = "mean"
    """How a chunk becomes one vector: the mean over its tokens, or the encoder's own pooler_output."""
    chunk_tokens: int = 128
    """Tokens T per chunk, the special ones included."""
    chunks: int = 4
    """Most chunks C per text; of a longer text the middle is left out."""
    hidden: int = 100
    """Width H of the text's and of the fields' branch."""
    fused: int = 100
    """Width F in which design gate weighs the two; the other designs weigh them at width H."""
    heads: int = 4
    """Attention heads of design cross_attention; must divide `hidden`."""
    dropout: float = 0.1
    """Dropout on the two branches."""
    holdout: int | None = 0
    """Validate on this fifth of the rows, 0 to 4; null validates on no rows, for a final model."""
    folds: int = 0
    """Out of fold: one model for each of 2, 5 or 10 hold-outs, and one of all rows that prices further tables."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a class weighs as much as every other one in the loss, however many rows it has."""
    label_smoothing: float = 0.05
    """Share of the target that cross-entropy spreads over all classes."""
    huber_delta: float = 1.0
    """Where the Huber loss of a number turns from squared to linear, in standard deviations of the target."""
    epochs: int = 4
    """Passes over the rows to fit; the epoch with the lowest loss on the stop fold is kept."""
    patience: int = 2
    """Epochs without a lower loss on the stop fold before training ends."""
    batch_size: int = 16
    """Rows per step and process."""
    lr: float = 5e-5
    """Peak learning rate of the encoder."""
    head_lr: float = 1e-3
    """Peak learning rate of branches and design."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm than this are scaled down to it."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass: less memory, more time."""
    fsdp: bool = False
    """Share weights, gradients and optimizer among the processes of torchrun (fully sharded data parallel)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>."""
    seed: int = 0
    """Seeds initial weights, the order of the rows and dropout."""
    split_seed: int = 0
    """Seeds the folds, which stay the same for every --seed."""
    resume: bool = False
    """Continue an interrupted run; a finished one is left as it is."""
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Tracker that receives the metrics as well."""

    def __post_init__(self) -> None:
        for name in ("train", "columns", "workspace"):
            setattr(self, name, Path(getattr(self, name)))
        for name in (
            "chunks",
            "hidden",
            "fused",
            "epochs",
            "patience",
            "batch_size",
            "lr",
            "head_lr",
            "lora_rank",
        ):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        if self.chunk_tokens < 8:
            raise InputError(f"--chunk-tokens {self.chunk_tokens}: a chunk needs at least 8 tokens")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must lie in [0, 1)")
        if self.frozen_layers < 0:
            raise InputError(f"--frozen-layers {self.frozen_layers}: must be 0 or more")
        if self.fields_as_text and self.design == "tabular":
            raise InputError("--fields-as-text: design tabular reads no text; use --design text")
        if self.fsdp and self.resume:
            raise InputError("--fsdp --resume: a sharded run keeps no checkpoints; leave one of them out")
        roles(self.holdout, self.folds or N_HOLDOUTS)  # raises for a hold-out that does not exist

    @property
    def reads_text(self) -> bool:
        return self.design != "tabular"

    @property
    def reads_fields(self) -> bool:
        return self.design != "text"


PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "tiny": {
        "model": "",
        "random_weights": True,
        "chunk_tokens": 48,
        "hidden": 64,
        "fused": 64,
        "epochs": 14,
        "patience": 7,
        "batch_size": 32,
        # random words learn slowly; a faster head would settle on the fields before they say anything
        "lr": 3e-3,
        "head_lr": 1e-3,
        "dropout": 0.2,
        "label_smoothing": 0.0,
    },
}


@dataclass
class FinishedSettings:
    """Settings of evaluate.py."""

    workspace: Path = REPOSITORY
    """Folder that holds checkpoints/<run>."""
    run: str = "text_tabular"
    """Name of the finished run."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>."""


@dataclass
class PredictSettings(FinishedSettings):
    """Settings of predict.py."""

    input: Path = Path("test.csv")
    """Table to predict, in any of the formats of the training table."""
    output: Path = Path("predictions.csv")
    """File that receives id, predicted and, of classes, one probability each; its ending says the format."""
    overwrite: bool = False
    """Replace an output that exists."""
