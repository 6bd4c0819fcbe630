"""Settings that both fusion packages share: how a model is trained, whatever it looks like."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from contracts.errors import InputError
from contracts.workspace import REPOSITORY

if TYPE_CHECKING:
    from fusion.blocks import PriceModel

LossName = Literal["weighted_smape", "smape", "smape_tanh", "focal_smape", "huber", "log_l1", "huber_smape"]
"""What --loss may choose; fusion/loss_functions.py has a function for each."""

TINY_TRAINING = {"epochs": 150, "patience": 20, "lr": 2e-3, "lr_patience": 5}
"""What --preset tiny changes in both packages: a small model learns faster."""


@dataclass
class TrainingSettings:
    """Settings of train.py that do not concern the model."""

    RENAMED: ClassVar[dict[str, str | None]] = {
        "clip_norm": "max_grad_norm",
        "checkpoint_epochs": "save_epochs",
    }

    preset: Literal["base", "tiny"] = "base"
    """base: the sizes of the published model; tiny: the same model with small layers, for a demo on a CPU."""
    workspace: Path = REPOSITORY
    """Folder that holds data/, checkpoints/ and predictions/."""
    run: str = "fusion"
    """Name of the run folder in checkpoints/, and of the prediction files."""
    holdout: int | None = 0
    """Validate on this fifth of the rows, 0 to 4; null validates on no rows, for a final model."""
    use: tuple[str, ...] = ()
    """Embeddings to use; empty means all that the model knows. The others count as missing in every row."""
    allow_leak: bool = False
    """Score rows that an encoder was fitted on, under the name "leaked", instead of refusing to."""
    loss: LossName = "focal_smape"
    """Training loss, chosen by studies/results/ablation_*.csv; the metric is always plain SMAPE."""
    target: Literal["log_price", "price"] = "log_price"
    """What the model's output means. price, in units of the mean price with a Huber loss, is an ablation."""
    under_15_weight: float = 10.0
    """Weight of the "under $15" cross-entropy beside a loss in percent, for models that have that output."""
    batch_size: int = 256
    """Rows per step, over all processes together."""
    lr: float = 1e-3
    """Learning rate of AdamW; it is halved after `lr_patience` epochs without a better stop score."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    epochs: int = 1000
    """Upper bound on the epochs; early stopping usually ends the run far before."""
    patience: int = 30
    """Epochs without a better SMAPE on the stop fold before training ends; 15 is the quick setting."""
    lr_patience: int = 8
    """Epochs without a better SMAPE on the stop fold before the learning rate is halved."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm than this are scaled down to it."""
    modality_dropout: float = 0.1
    """Chance that training hides an embedding of a row, each on its own; a row keeps at least one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere. The output layer and the loss are fp32 in either case."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>."""
    compile: bool = False
    """Compile the model, and on CUDA replay each step as a CUDA graph. On a CPU it gains nothing."""
    seed: int = 0
    """Seeds the initial weights, the order of the rows and dropout."""
    save_epochs: int = 20
    """Epochs between two checkpoints that --resume can continue from."""
    resume: bool = False
    """Continue an interrupted run; a finished one is left as it is."""
    report_to: Literal["none", "tensorboard"] = "none"
    """tensorboard also writes event files to checkpoints/<run>/tensorboard."""

    def __post_init__(self) -> None:
        self.workspace = Path(self.workspace)
        for name in ("batch_size", "lr", "epochs", "patience", "max_grad_norm", "save_epochs"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        if not 0 <= self.modality_dropout < 1:
            raise InputError(f"--modality-dropout {self.modality_dropout}: must lie in [0, 1)")


@dataclass
class EvaluateSettings:
    """Settings of evaluate_by_groups.py; what concerns the model comes from the run."""

    workspace: Path = REPOSITORY
    """Folder that holds data/ and checkpoints/."""
    run: str = ""
    """Name of the finished run; empty means the package's default run."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>."""


@dataclass
class PredictSettings(EvaluateSettings):
    """Settings of predict_test.py."""

    out: Path | None = None
    """File to write; null means test_out.csv in the workspace."""
    int8: bool = False
    """Price row by row from int8 weights on the CPU, as a service would that gets one product at a time."""

    def __post_init__(self) -> None:
        if self.int8 and self.device not in ("auto", "cpu"):
            raise InputError(
                f"--int8 --device {self.device}: int8 weights run on a CPU only; use --device cpu"
            )
        if self.int8:
            self.device = "cpu"


@dataclass(frozen=True)
class Package:
    """What tells the commands of one fusion package apart from those of the other."""

    name: str
    """Its module, such as fusion.all_embeddings."""
    settings: type[TrainingSettings]
    presets: dict[str, dict[str, Any]]
    modalities: tuple[str, ...]
    """Names of the embeddings that the model reads, in the order of the columns of its mask."""
    model: str
    """Where its model class is, as module:class. It is imported late, as --help must not wait for torch."""

    def build_model(self, settings: Any, widths: dict[str, int]) -> PriceModel:
        """The model of these settings with random weights, for embeddings of these widths D_in."""
        return pkgutil.resolve_name(self.model)(settings, widths)
