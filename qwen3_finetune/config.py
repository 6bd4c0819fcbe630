"""Every setting of this stage with its default. Edit a default here, or pass it as a flag."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from contracts.errors import InputError
from contracts.splits import N_HOLDOUTS, Roles, roles
from contracts.workspace import QWEN_TEXT, REPOSITORY
from training.run_folder import part_folder
from training.trackers import ReportTo

# What --random-weights builds without any file. Every other model states its sizes in its own config.json.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-Embedding-0.6B": {
        "vocab_size": 151669, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    # A few thousand texts are enough to train this one from random weights. An RMSNorm epsilon of 1 keeps the vector
    # of a token that training hardly saw near zero, while the usual 1e-6 would scale its noise up to full length.
    "tiny": {
        "vocab_size": 8000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024,
        "rms_norm_eps": 1.0,
    },
}  # fmt: skip


@dataclass
class QwenSettings:
    """Settings of train.py: a text encoder and a regression head on log price."""

    RENAMED: ClassVar[dict[str, str | None]] = {
        "checkpoint_steps": "save_steps",
        "clip_norm": "max_grad_norm",
        "grad_accum": "gradient_accumulation_steps",
        "lora_layers": "target_modules",
        "warmup": "warmup_ratio",
    }

    workspace: Path = REPOSITORY
    """folder that holds data/, checkpoints/ and predictions/"""
    preset: Literal["base", "tiny"] = "base"
    """base: a pretrained encoder; tiny: a small one with random weights, for demos and tests"""
    run: str = "qwen3_finetune"
    """name of the run folder in checkpoints/ and of the predictions"""
    holdout: int | None = 0
    """hold-out, 0 to 4: two of the ten folds that are only validated on; null validates on none, for a final model"""
    folds: int = 0
    """0 trains one encoder; 2, 5 or 10 trains out of fold: that many encoders, each without the rows that it embeds
    later, and one on all rows, which embeds the test rows"""

    model: str = "Qwen/Qwen3-Embedding-0.6B"
    """text encoder: hub id or local folder; with --random-weights also tiny"""
    tokenizer: str = ""
    """hub id or local folder; empty takes that of the model, or with --random-weights learns one from the texts"""
    random_weights: bool = False
    """start from random weights instead of pretrained ones, so that nothing is downloaded"""
    quantization: Literal["auto", "nf4", "none"] = "auto"
    """nf4 stores the weights of the frozen encoder in 4 bits; auto is nf4 on CUDA unless --train full, else none"""
    pooling: Literal["auto", "last", "mean", "cls"] = "auto"
    """how token vectors become one embedding; auto follows 1_Pooling/config.json of the model, or without that file
    takes the last token of a decoder and the mean of any other encoder"""
    instruction: str = ""
    """what the encoder is told about every text: it reads "Instruct: <instruction>\\nQuery:" before the text"""
    max_length: int = 512
    """tokens per text; a longer text loses tokens from its middle and keeps its Value and Unit lines"""

    train: Literal["lora", "full", "head"] = "lora"
    """what is trained besides the head: LoRA adapters, all weights of the encoder, or nothing (a frozen encoder)"""
    lora_rank: int = 16
    """rank of the adapters"""
    lora_alpha: float = 32.0
    """the output of an adapter is multiplied by alpha / rank"""
    lora_dropout: float = 0.05
    """dropout on the input of an adapter"""
    target_modules: str = "all-linear"
    """linear layers that get an adapter: the last parts of their names, such as q_proj,v_proj, or all-linear"""
    head_hidden: int = 256
    """hidden width of the regression head"""
    head_dropout: float = 0.1
    """dropout in the regression head"""
    encoder_dropout: float | None = None
    """dropout in the encoder; null keeps the value of its config. On a CPU, BERT's 0.1 doubles the forward time"""
    token_dropout: float = 0.0
    """share of the tokens that training hides from the encoder; it helps small catalogues"""

    huber_weight: float = 1.0
    """weight of the Huber loss on log1p(price)"""
    smape_weight: float = 0.5
    """weight of the SMAPE loss, which is a fraction from 0 to 2"""
    huber_delta: float = 1.0
    """error in log1p(price) from which on the Huber loss is linear"""

    epochs: int = 3
    """passes over the fit rows"""
    patience: int = 2
    """epochs without a better SMAPE on the stop fold after which training ends"""
    batch_size: int = 16
    """micro-batch size: texts per process and forward pass"""
    gradient_accumulation_steps: int = 2
    """micro-batches accumulated per update of the weights"""
    lr: float = 2e-4
    """peak learning rate of the encoder or its adapters"""
    head_lr: float = 1e-3
    """peak learning rate of the head"""
    weight_decay: float = 0.01
    """weight decay of AdamW"""
    warmup_ratio: float = 0.05
    """share of all updates over which the learning rate rises; after that it falls along a cosine to 0"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm where it is larger"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass: less memory, about a third more time"""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 autocast on CUDA and fp32 elsewhere"""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>"""
    tokens_per_batch: int | None = None
    """padded tokens per batch where nothing is trained; null is 2048 on a CPU, to fit its cache, and 16384 elsewhere"""
    workers: int = 0
    """processes per training process that pad the batches; the texts are tokenised only once, before training"""
    seed: int = 0
    """seed of the head, the random weights, the dropout and the order of the rows"""
    save_steps: int = 500
    """updates between checkpoints within an epoch"""
    resume: bool = False
    """continue this run from its newest complete checkpoint"""
    report_to: ReportTo = "none"
    """tracker that also receives settings and metrics; wandb and mlflow are packages to install"""

    def __post_init__(self) -> None:
        self.workspace = Path(self.workspace)
        if self.target_modules == "all":  # the name of older versions
            self.target_modules = "all-linear"

        if self.train == "full" and self.quantization == "nf4":
            raise InputError(
                "--train full: 4-bit weights cannot be trained; use --quantization none or --train lora"
            )
        at_least_one = (
            "lora_rank", "epochs", "patience", "batch_size", "gradient_accumulation_steps", "save_steps",
        )  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        roles(0, self.n_holdouts)  # raises unless ten folds can be dealt into that many hold-outs
        roles(self.holdout, self.n_holdouts)  # raises for a hold-out that does not exist
        if self.max_length < 16:
            raise InputError(
                f"--max-length {self.max_length}: must be at least 16, to hold the Value and Unit lines"
            )
        if self.huber_weight < 0 or self.smape_weight < 0 or self.huber_weight + self.smape_weight == 0:
            raise InputError(
                "--huber-weight and --smape-weight: neither may be negative and one must be above 0"
            )

    @property
    def n_holdouts(self) -> int:
        """Into how many hold-outs the ten folds are dealt."""
        return self.folds or N_HOLDOUTS

    @property
    def roles(self) -> Roles:
        """The folds that this run fits, stops on and validates."""
        return roles(self.holdout, self.n_holdouts)

    def parts(self) -> list[QwenSettings]:
        """The settings of each encoder of an out-of-fold run: one per hold-out, then the one of all rows."""
        holdouts = [*range(self.folds), None]
        return [
            replace(self, run=f"{self.run}/{part_folder(holdout)}", holdout=holdout) for holdout in holdouts
        ]


def choose_tokens_per_batch(wanted: int | None, device_type: str) -> int:
    """What --tokens-per-batch says, or what suits the device."""
    if wanted is not None and wanted < 1:
        raise InputError(f"--tokens-per-batch {wanted}: must be at least 1")
    return wanted or (2048 if device_type == "cpu" else 16384)


PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "tiny": {
        "model": "tiny", "random_weights": True, "train": "full", "pooling": "mean", "max_length": 160,
        "token_dropout": 0.3, "head_dropout": 0.3, "smape_weight": 1.0, "epochs": 8, "patience": 3,
        "batch_size": 64, "gradient_accumulation_steps": 1, "lr": 2e-3, "head_lr": 2e-3,
        "gradient_checkpointing": False,
    },
}  # fmt: skip


@dataclass
class ApplySettings:
    """Settings of the programs that use a finished run; those of the model come from the run folder."""

    workspace: Path = REPOSITORY
    """folder that holds data/, checkpoints/ and predictions/"""
    run: str = "qwen3_finetune"
    """name of the run folder in checkpoints/"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 autocast on CUDA and fp32 elsewhere"""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>"""
    tokens_per_batch: int | None = None
    """padded tokens per batch; null is 2048 on a CPU, to fit its cache, and 16384 elsewhere"""


@dataclass
class ExtractSettings(ApplySettings):
    """Settings of extract_embeddings.py."""

    embedding: str = QWEN_TEXT
    """name of the embedding file: data/embeddings/<embedding>_<table>.pkl"""
    shard_rows: int = 4096
    """rows per shard: an interrupted extraction continues with the shards that are missing"""
    align: bool = True
    """bring the encoders of an out-of-fold run into one space; without it, a study can measure what that is worth"""
    keep_shards: bool = False
    """leave the embeddings in shards, for a catalogue too large for one file"""
