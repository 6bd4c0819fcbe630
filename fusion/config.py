"""Settings that both fusion packages share: how a model is trained, whatever it looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from contracts.errors import InputError
from contracts.workspace import REPOSITORY

LossName = Literal["weighted_smape", "smape", "smape_tanh", "focal_smape", "huber", "log_l1", "huber_smape"]


@dataclass
class TrainingSettings:
    preset: Literal["base", "tiny"] = "base"
    """base: the sizes of the published model; tiny: the same model small, for a demo on a CPU."""
    workspace: str = str(REPOSITORY)
    """Folder with data/ and checkpoints/."""
    run: str = "fusion"
    """Name of the run folder under checkpoints/."""
    holdout: int | None = 0
    """Validate on this fifth of the rows (0 to 4); null validates on nothing, for a final model."""
    use: tuple[str, ...] = ()
    """Embeddings to use; empty means all of the model's. The others are treated as missing everywhere."""
    allow_leak: bool = False
    """Score rows that an encoder was fitted on, under the name "leaked", instead of refusing."""
    loss: LossName = "focal_smape"
    """Training loss, chosen by studies/results/ablation_*.csv; the metric is always plain SMAPE."""
    target: Literal["log_price", "price"] = "log_price"
    """What the model's output means; price (in units of the mean price, Huber loss) is an ablation."""
    under_15_weight: float = 10.0
    """Weight of the "under $15" cross-entropy beside a loss in percent, where the model has that output."""
    batch_size: int = 256
    """Rows a step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; halved when the stop score has not improved for `lr_patience` epochs."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    epochs: int = 1000
    """Upper bound; early stopping usually ends far before."""
    patience: int = 30
    """Epochs without a better SMAPE on the stop fold before training ends; 15 is the quick setting."""
    lr_patience: int = 8
    """Epochs without improvement before the learning rate is halved."""
    clip_norm: float = 1.0
    """Gradient norm bound."""
    modality_dropout: float = 0.1
    """Chance that a row's embedding is hidden in training, each on its own; a row keeps at least one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    compile: bool = False
    """Compile the model, and on CUDA replay each step as a CUDA graph. Gains nothing on a CPU."""
    seed: int = 0
    """Seeds initial weights, row order, dropout."""
    checkpoint_epochs: int = 20
    """Epochs between checkpoints that --resume can continue from."""
    resume: bool = False
    """Continue an interrupted run; a finished one is left as it is."""
    report_to: Literal["none", "tensorboard"] = "none"
    """Also log to tensorboard, under checkpoints/<run>/tensorboard."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "lr", "epochs", "patience", "clip_norm", "checkpoint_epochs"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        if not 0 <= self.modality_dropout < 1:
            raise InputError(f"--modality-dropout {self.modality_dropout}: must lie in [0, 1)")


@dataclass
class ApplySettings:
    workspace: str = str(REPOSITORY)
    """Folder with data/ and checkpoints/."""
    run: str = ""
    """Name of the finished run; empty means the package's default run."""
    out: str = ""
    """Where predict_test writes; empty means test_out.csv in the workspace."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
