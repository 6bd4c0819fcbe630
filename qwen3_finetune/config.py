"""Settings of this stage: edit a default here, or pass it as a flag."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from contracts.errors import InputError
from contracts.splits import N_HOLDOUTS, Roles, roles
from contracts.workspace import REPOSITORY

# What `--random-weights` can build without any file; for every other model its folder's config.json is read.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-Embedding-0.6B": {
        "vocab_size": 151669, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    # A few thousand texts train this one from nothing. With an RMSNorm epsilon of 1 a token keeps the length of its
    # embedding, so one that training hardly saw stays near zero; the usual 1e-6 would blow its random vector up.
    "tiny": {
        "vocab_size": 8000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024,
        "rms_norm_eps": 1.0,
    },
}  # fmt: skip


@dataclass
class QwenSettings:
    """Train a text encoder and a regression head on log price."""

    workspace: Path = REPOSITORY
    """folder with data/prepared_train.csv; everything is written there"""
    preset: Literal["base", "tiny"] = "base"
    """base: the real encoder; tiny: a small one with random weights, for demos and tests"""
    run: str = "qwen3_finetune"
    """name of the run folder under checkpoints/ and of the predictions"""
    holdout: int | None = 0
    """which of five hold-outs is validated, 0 to 4; null: none, for a final model"""
    folds: int = 0
    """0: one encoder; 5 (or 2, 10): out of fold, as many encoders, each for rows it has not seen, and one for test"""

    model: str = "Qwen/Qwen3-Embedding-0.6B"
    """text encoder: hub id or local folder"""
    tokenizer: str = ""
    """tokenizer: hub id or local folder; empty: the model's own, and with random weights one trained on the texts"""
    random_weights: bool = False
    """build the architecture without its pretrained weights"""
    quantization: Literal["auto", "nf4", "none"] = "auto"
    """weights of a frozen encoder in 4 bits; auto: nf4 on CUDA, none elsewhere and with --train full"""
    pooling: Literal["auto", "last", "mean", "cls"] = "auto"
    """auto: as the model's 1_Pooling/config.json says, else last token for a decoder and mean for the rest"""
    instruction: str = ""
    """prefix "Instruct: <instruction>\\nQuery:" before every text"""
    max_length: int = 512
    """tokens of a text; a longer one is cut in the middle and keeps its Value and Unit lines"""

    train: Literal["lora", "full", "head"] = "lora"
    """what learns besides the head: LoRA adapters, every weight of the encoder, or nothing (frozen encoder)"""
    lora_rank: int = 16
    """rank of the adapters"""
    lora_alpha: float = 32.0
    """adapters are scaled by alpha / rank"""
    lora_dropout: float = 0.05
    """dropout before the adapters"""
    lora_layers: str = "all"
    """linear layers with adapters, by the last part of their name, such as "q_proj,v_proj"; all: every one"""
    head_hidden: int = 256
    """hidden width of the regression head"""
    head_dropout: float = 0.1
    """dropout in the regression head"""
    encoder_dropout: float | None = None
    """dropout in the encoder; null: as its config says. Drawing BERT's 0.1 doubles the forward time on a CPU"""
    token_dropout: float = 0.0
    """share of tokens hidden from the encoder in training; helps small catalogues"""

    huber_weight: float = 1.0
    """weight of the Huber loss on log1p(price)"""
    smape_weight: float = 0.5
    """weight of the SMAPE loss, scaled to 0 to 2"""
    huber_delta: float = 1.0
    """error in log1p(price) beyond which the Huber loss is linear"""

    epochs: int = 3
    """passes over the fit rows"""
    patience: int = 2
    """stop after this many epochs without a better SMAPE on the stop fold"""
    batch_size: int = 16
    """rows a device and a step of --grad-accum"""
    grad_accum: int = 2
    """batches an update"""
    lr: float = 2e-4
    """peak learning rate of the encoder or its adapters"""
    head_lr: float = 1e-3
    """peak learning rate of the head"""
    weight_decay: float = 0.01
    """AdamW weight decay"""
    warmup: float = 0.05
    """share of the updates that warm up; a cosine to zero follows"""
    clip_norm: float = 1.0
    """largest gradient norm"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass: less memory, about a third more time"""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 elsewhere"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to compute"""
    tokens_per_batch: int | None = None
    """padded tokens a batch when nothing is trained; null: 2048 on a CPU, for its cache, and 16384 elsewhere"""
    workers: int = 0
    """processes that pad the training batches; the texts are tokenised beforehand"""
    seed: int = 0
    """of the head, dropout, data order and random weights"""
    checkpoint_steps: int = 500
    """updates between two checkpoints within an epoch"""
    resume: bool = False
    """continue the run from its newest checkpoint"""
    report_to: Literal["none", "tensorboard"] = "none"
    """also log to tensorboard"""

    def __post_init__(self) -> None:
        if self.train == "full" and self.quantization == "nf4":
            raise InputError(
                "--train full: 4-bit weights cannot be trained; use --quantization none or --train lora"
            )
        at_least_one = (
            "lora_rank", "epochs", "patience", "batch_size", "grad_accum", "checkpoint_steps",
        )  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        roles(self.holdout, self.folds or N_HOLDOUTS)  # refuses those that there are not
        if self.max_length < 16:
            raise InputError(
                f"--max-length {self.max_length}: must be at least 16, to hold the Value and Unit lines"
            )
        if self.huber_weight < 0 or self.smape_weight < 0 or self.huber_weight + self.smape_weight == 0:
            raise InputError(
                "--huber-weight and --smape-weight: neither may be negative and one must be above 0"
            )

    @property
    def roles(self) -> Roles:
        """Folds that this run fits, stops on and validates."""
        return roles(self.holdout, self.folds or N_HOLDOUTS)

    def parts(self) -> list[QwenSettings]:
        """The runs that make this one: itself, or with --folds one for each hold-out and one of all rows."""
        if not self.folds:
            return [self]
        holdouts = [*range(self.folds), None]
        return [replace(self, run=part_name(self.run, holdout), holdout=holdout) for holdout in holdouts]


def choose_tokens_per_batch(wanted: int | None, device_type: str) -> int:
    """What --tokens-per-batch says, or what suits the device."""
    if wanted is not None and wanted < 1:
        raise InputError(f"--tokens-per-batch {wanted}: must be at least 1")
    return wanted or (2048 if device_type == "cpu" else 16384)


def part_name(run: str, holdout: int | None) -> str:
    """Folder of one encoder of an out-of-fold run."""
    return f"{run}/all" if holdout is None else f"{run}/fold_{holdout}"


PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "tiny": {
        "model": "tiny", "random_weights": True, "train": "full", "pooling": "mean", "max_length": 160,
        "token_dropout": 0.3, "head_dropout": 0.3, "smape_weight": 1.0, "epochs": 8, "patience": 3,
        "batch_size": 64, "grad_accum": 1, "lr": 2e-3, "head_lr": 2e-3, "gradient_checkpointing": False,
    },
}  # fmt: skip


@dataclass
class ApplySettings:
    """Use a finished run; everything about the model comes from the run folder."""

    workspace: Path = REPOSITORY
    """folder with the prepared tables and checkpoints/"""
    run: str = "qwen3_finetune"
    """name of the run folder under checkpoints/"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 elsewhere"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to compute"""
    tokens_per_batch: int | None = None
    """padded tokens a batch; null: 2048 on a CPU, for its cache, and 16384 elsewhere"""


@dataclass
class ExtractSettings(ApplySettings):
    """As above, and how the embedding file is written."""

    name: str = "qwen_text"
    """name of the embedding file"""
    shard_rows: int = 4096
    """rows between two points from which an interrupted extraction resumes"""
    align: bool = True
    """bring the encoders of an out-of-fold run into one space; false only to measure what that is worth"""
    keep_shards: bool = False
    """leave the embeddings in shards, for a catalogue too large for one file"""
