"""One model, fitted on the rows of some folds and written into a folder.

A model of all rows has no row to stop on. It trains for as many epochs, with the same learning rates, as were best
for a validated model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.files import read_json, write_json
from contracts.splits import N_FOLDS, Roles
from contracts.workspace import Workspace
from fusion.blocks import PriceModel
from fusion.config import TABULAR, Package, TrainingSettings
from fusion.dataset import FusionTable, check_no_leak, load_table, uses_tabular
from fusion.finished import INPUTS, WEIGHTS
from fusion.loop import learning_rates_until_best, train, train_by_schedule
from fusion.tabular import TableColumns
from fusion.target import Target
from training.device import choose_device, seed_everything
from training.plots import plot_training_curves
from training.processes import from_first_process
from training.run_folder import RunFolder
from training.weights import save_weights

ALL_ROWS = Roles(fit=tuple(range(N_FOLDS)), stop=(), validate=())


@dataclass
class TrainingData:
    """The rows that a run is trained and scored on."""

    table: FusionTable
    """with the embeddings only: each model learns from its own rows how to read the table's columns"""
    uses_tabular: bool
    is_leaked: bool
    """whether an encoder was fitted on rows to validate on"""
    inputs: list[Path]
    """the files that were read"""


def build_data(package: Package, settings: TrainingSettings) -> TrainingData:
    """Load the training table onto the device and check that validating on its held-out rows is honest."""
    package.check_use(settings.use)
    workspace = Workspace(settings.workspace)
    table = load_table(workspace, "train", package.modalities, settings.use)
    is_leaked = check_no_leak(
        table, settings.validated_folds, allow=settings.allow_leak, out_of_fold=settings.folds > 0
    )
    inputs = [workspace.path("prepared", split="train"), workspace.path("folds")]
    for name in table.meta:
        inputs.append(workspace.path("embeddings", name=name, split="train"))
    tabular = package.reads_features and uses_tabular(table.rows, settings.use)
    return TrainingData(table.to(choose_device(settings.device)), tabular, is_leaked, inputs)


def fit_model(
    package: Package,
    settings: TrainingSettings,
    data: TrainingData,
    run: RunFolder | None,
    roles: Roles,
    learning_rates: list[float] | None = None,
) -> dict[str, Any]:
    """Fit one model and write it into the folder of `run`; one that lies there already is left as it is.

    Args:
        run: None on all processes but the first, which write nothing.
        learning_rates: of each epoch; None trains until the score on the stop fold gets no better.

    Returns:
        parameters, epochs and, with a stop fold, best_epoch and stop_smape.
    """
    finished = from_first_process(run and outcome_in(run.path))
    if finished:
        return finished
    fit = data.table.rows_in(roles.fit)
    stop = data.table.rows_in(roles.stop)
    columns = TableColumns.fit(data.table.rows.iloc[fit.numpy()]) if data.uses_tabular else None
    table = data.table.with_tabular(columns)
    target = Target.of(settings, table.log_price[fit])
    seed_everything(settings.seed)
    model = package.build_model(settings, table.widths)
    model.set_output_bias(target.output_bias)
    model.to(table.valid.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if run:
        print(f"{settings.run}: {parameters:,} parameters; {len(fit)} rows to fit, {len(stop)} to stop on")
    if run and columns:
        print(f"the table's own features make {columns.width} columns")

    if learning_rates is None:
        trained = train(model, table, fit, stop, target, settings, run)
    else:
        trained = train_by_schedule(model, table, fit, target, settings, run, learning_rates)
    outcome = {"parameters": parameters, **trained}
    if run:
        plot_training_curves(run.path / "training_curves.png", run.metrics(), title=settings.run)
        save_model(run.path, model, table, target, columns, outcome)
    return outcome


def save_model(
    folder: Path,
    model: PriceModel,
    table: FusionTable,
    target: Target,
    columns: TableColumns | None,
    outcome: dict[str, Any],
) -> None:
    """Write the weights, and behind them what the model was trained on."""
    save_weights(folder / WEIGHTS, model.state_dict())
    inputs = {
        "widths": table.widths,
        "encoders": {name: meta["checkpoint"] for name, meta in table.meta.items()},
        "mean_price": target.mean_price,
        "mean_log_price": target.mean_log_price,
        "outcome": outcome,
    }
    if columns is not None:
        inputs[TABULAR] = columns.to_json()
    write_json(folder / INPUTS, inputs)


def outcome_in(folder: Path) -> dict[str, Any] | None:
    """What `fit_model` returned for the model in this folder; None where there is no whole model."""
    path = folder / INPUTS
    return read_json(path).get("outcome") if path.is_file() else None


def median_learning_rates(folders: list[Path]) -> list[float]:
    """The learning rates until its best epoch of that of the validated models whose best epoch is the median one."""
    rates_of_each = []
    for folder in folders:
        outcome = outcome_in(folder)
        assert outcome is not None, f"{folder} has no model"
        rates_of_each.append(learning_rates_until_best(RunFolder(folder).metrics(), outcome["best_epoch"]))
    by_epochs = sorted(rates_of_each, key=len)
    return by_epochs[(len(by_epochs) - 1) // 2]
