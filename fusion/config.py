"""Settings that both fusion packages share: how a model is trained, whatever it looks like."""

from __future__ import annotations

import dataclasses
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from contracts.errors import InputError
from contracts.splits import N_FOLDS, N_HOLDOUTS, Roles, roles
from contracts.workspace import REPOSITORY
from training.run_folder import part_folder
from training.trackers import ReportTo

if TYPE_CHECKING:
    from fusion.blocks import PriceModel

LossName = Literal["weighted_smape", "smape", "smape_tanh", "focal_smape", "huber", "log_l1", "huber_smape"]
"""What --loss may choose; fusion/loss_functions.py has a function for each."""

TABULAR = "tabular"
"""Name of the feature columns of the table itself, which are an input beside those of the embeddings."""

QUICK_TRAINING = {"patience": 15}
"""What --preset quick changes in both packages: training ends sooner."""

TINY_TRAINING = {"epochs": 150, "patience": 20, "lr": 2e-3, "lr_patience": 5}
"""What --preset tiny changes in both packages: a small model learns faster."""


@dataclass
class TrainingSettings:
    """Settings of train.py that do not concern the model."""

    RENAMED: ClassVar[dict[str, str | None]] = {
        "clip_norm": "max_grad_norm",
        "checkpoint_epochs": "save_epochs",
    }

    preset: Literal["base", "quick", "tiny"] = "base"
    """base: the sizes of the published model; quick: base with a shorter patience; tiny: the same model with
    small layers, for a demo on a CPU."""
    workspace: Path = REPOSITORY
    """Folder that holds data/, checkpoints/ and predictions/."""
    run: str = "fusion"
    """Name of the run folder in checkpoints/, and of the prediction files."""
    holdout: int | None = 0
    """Validate on this fifth of the rows, 0 to 4; null validates on no rows, for a final model."""
    folds: int = 0
    """0 trains for one hold-out; 2, 5 or 10 trains out of fold: one model per hold-out, so that every row gets a
    price from a model that has not seen it, and one of all rows, which prices every other table."""
    refit: bool = False
    """After the validation, also fit a model on all rows, for as many epochs as were best for the validated one;
    it prices every other table. With --folds there is such a model in any case."""
    seeds: int = 1
    """Number of models that differ in their seed only; the mean of their ln prices is the price."""
    use: tuple[str, ...] = ()
    """Embeddings to use, and tabular for the table's own feature columns; empty means all that there are. An
    embedding that is left out counts as missing in every row."""
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
    report_to: ReportTo = "none"
    """Tracker that also receives settings and metrics; wandb and mlflow are packages to install."""

    def __post_init__(self) -> None:
        self.workspace = Path(self.workspace)
        for name in ("batch_size", "lr", "epochs", "patience", "max_grad_norm", "save_epochs", "seeds"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        if not 0 <= self.modality_dropout < 1:
            raise InputError(f"--modality-dropout {self.modality_dropout}: must lie in [0, 1)")
        roles(0, self.holdouts)  # raises unless ten folds can be dealt into that many hold-outs
        roles(self.holdout, self.holdouts)  # raises for a hold-out that does not exist
        if self.refit and self.holdout is None and not self.folds:
            raise InputError(
                "--refit --holdout null: the epochs of a model of all rows come from a validated one; name a hold-out"
            )

    @property
    def holdouts(self) -> int:
        """Into how many hold-outs the ten folds are dealt."""
        return self.folds or N_HOLDOUTS

    @property
    def roles(self) -> Roles:
        """The folds that the model of this hold-out fits, stops and validates on."""
        return roles(self.holdout, self.holdouts)

    @property
    def validated_folds(self) -> tuple[int, ...]:
        """The folds whose rows get a price from a model that has not seen them."""
        return tuple(range(N_FOLDS)) if self.folds else self.roles.validate

    def part(self, holdout: int | None) -> Self:
        """The settings of one model inside this run: that of a hold-out, or with None that of all rows."""
        return dataclasses.replace(
            self, run=f"{self.run}/{part_folder(holdout)}", holdout=holdout, refit=False
        )

    def by_seed(self) -> list[Self]:
        """The settings of each model that differs in its seed only; a single one has this run's own folder."""
        if self.seeds == 1:
            return [self]
        each = []
        for number in range(self.seeds):
            run = f"{self.run}/{seed_folder(number)}"
            each.append(dataclasses.replace(self, run=run, seed=self.seed + number, seeds=1, refit=False))
        return each


def seed_folder(number: int) -> str:
    """Folder of one of several models that differ in their seed."""
    return f"seed_{number}"


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
    """Settings of predict.py."""

    int8: bool = False
    """Price row by row from int8 weights on the CPU, as a service would that gets one product at a time."""

    def __post_init__(self) -> None:
        if self.int8 and self.device not in ("auto", "cpu"):
            raise InputError(
                f"--int8 --device {self.device}: int8 weights run on a CPU only; use --device cpu"
            )
        if self.int8:
            self.device = "cpu"


@dataclass
class SubmitSettings(PredictSettings):
    """Settings of predict_test.py."""

    out: Path | None = None
    """File to write; null means test_out.csv in the workspace."""


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
    reads_features: bool = False
    """Whether the model also reads the feature columns of the table, as a last modality called tabular."""

    def check_use(self, use: tuple[str, ...]) -> None:
        """Raise InputError for a name in `use` that is no input of the model."""
        known = (*self.modalities, TABULAR) if self.reads_features else self.modalities
        if unknown := set(use) - set(known):
            raise InputError(f"--use {', '.join(sorted(unknown))}: choose from {', '.join(known)}")

    def build_model(self, settings: Any, widths: dict[str, int]) -> PriceModel:
        """The model of these settings with random weights, for embeddings of these widths D_in."""
        return pkgutil.resolve_name(self.model)(settings, widths)
