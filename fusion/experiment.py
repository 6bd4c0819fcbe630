"""One protocol for every fusion model: fit, stop and validate on rows that were kept apart from the start.

The encoders behind the embeddings fitted on the same `fit` and `stop` folds, so the `validate` rows are new
to the whole system. A score on rows that any encoder has seen is refused, or called leaked on request.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contracts import splits
from contracts.errors import InputError
from contracts.files import atomic_write, read_json, write_json
from contracts.predictions import remove_predictions, write_predictions
from contracts.workspace import SPLITS, Workspace
from fusion.blocks import PriceModel
from fusion.config import EvaluateSettings, Package, PredictSettings, TrainingSettings
from fusion.dataset import FusionTable, check_no_leak, load_table
from fusion.evaluation import write_scores
from fusion.int8 import int8_copy
from fusion.loop import predict, train
from fusion.target import Target
from training.device import choose_device, seed_everything
from training.plots import plot_training_curves
from training.processes import process, process_group
from training.run_folder import RunFolder, save_weights


@dataclass
class TrainingData:
    """The rows that a run is trained and scored on."""

    table: FusionTable
    roles: splits.Roles
    is_leaked: bool
    """whether an encoder was fitted on rows to validate on"""
    inputs: list[Path]
    """the files that were read"""


def build_data(package: Package, settings: TrainingSettings) -> TrainingData:
    """Load the training table onto the device and check that validating on its held-out rows is honest."""
    workspace = Workspace(settings.workspace)
    roles = splits.roles(settings.holdout)
    table = load_table(workspace, "train", package.modalities, settings.use)
    is_leaked = check_no_leak(table, roles.validate, allow=settings.allow_leak)
    inputs = [workspace.path("prepared", split="train"), workspace.path("folds")]
    for name in settings.use or package.modalities:
        inputs.append(workspace.path("embeddings", name=name, split="train"))
    return TrainingData(table.to(choose_device(settings.device)), roles, is_leaked, inputs)


def fit_and_score(package: Package, settings: TrainingSettings, data: TrainingData) -> dict[str, Any]:
    """Train, keep the best weights, score them on the validation rows, leave everything in the run folder.

    Returns the content of summary.json. Under torchrun, only the first process returns the scores with it.
    """
    folder = Workspace(settings.workspace).path("run", name=settings.run)
    if RunFolder(folder).already_complete(settings.resume):
        return read_json(folder / "summary.json")
    with process_group(data.table.valid.device):
        return _fit_and_score(package, settings, data, folder)


def _fit_and_score(
    package: Package, settings: TrainingSettings, data: TrainingData, folder: Path
) -> dict[str, Any]:
    workspace = Workspace(settings.workspace)
    seed_everything(settings.seed)
    model = package.build_model(settings, data.table.widths)
    run = None
    if process()[0] == 0:  # the other processes only compute
        run = RunFolder.start(
            folder, settings, inputs=data.inputs, resume=settings.resume, report_to=settings.report_to
        )
        for split in SPLITS:  # an earlier run of this name is gone, and its prices with it
            remove_predictions(workspace, settings.run, split)
    fit = data.table.rows_in(data.roles.fit)
    stop = data.table.rows_in(data.roles.stop)
    target = Target.of(settings, data.table.log_price[fit])
    model.set_output_bias(target.output_bias)
    model.to(data.table.valid.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if run:
        print(data.table.coverage())
        print(f"{parameters:,} parameters; {len(fit)} rows to fit, {len(stop)} to stop on")
    outcome = train(model, data.table, fit, stop, target, settings, run)
    summary = {"parameters": parameters, **outcome}
    if run is None:
        return summary

    _save_model(folder, model, data.table, target)
    plot_training_curves(folder / "training_curves.png", run.metrics(), title=settings.run)
    if data.roles.validate:
        summary |= _validate(package, settings, data, model, target, folder)
    run.finish(**summary)
    return summary


def _save_model(folder: Path, model: PriceModel, table: FusionTable, target: Target) -> None:
    save_weights(folder / "model.safetensors", model.state_dict())
    inputs = {
        "widths": table.widths,
        "encoders": {name: meta["checkpoint"] for name, meta in table.meta.items()},
        "mean_price": target.mean_price,
        "mean_log_price": target.mean_log_price,
    }
    write_json(folder / "inputs.json", inputs)


def _validate(
    package: Package,
    settings: TrainingSettings,
    data: TrainingData,
    model: PriceModel,
    target: Target,
    folder: Path,
) -> dict[str, Any]:
    """Price the validation rows, and write their scores and, unless they are leaked, the prices."""
    rows = data.table.rows_in(data.roles.validate)
    log_price = predict(model, data.table, rows, target).double().numpy()
    if not data.is_leaked:
        priced = data.table.rows.iloc[rows.numpy()]
        write_predictions(
            Workspace(settings.workspace),
            settings.run,
            "train",
            priced["sample_id"].to_numpy(),
            log_price,
            meta=_prediction_meta(package, settings.run, data.roles, data.table),
            fold=priced["fold"].to_numpy(),
        )
    name = "leaked" if data.is_leaked else "validation"
    scores = write_scores(folder, data.table, rows.numpy(), np.expm1(log_price), name=name)
    smape = scores[f"{name}_smape"]
    print(f"{name} SMAPE {smape:.2f} ± {scores['standard_error']:.2f} on {scores['rows']} rows")
    return scores


def _prediction_meta(package: Package, run: str, roles: splits.Roles, table: FusionTable) -> dict[str, Any]:
    """What a prediction file says of its origin: the folds of the model and of the encoders that it used."""
    fitted = [splits.fitted_on(encoder_folds=roles.fitted_on)]
    for meta in table.meta.values():
        fitted.append(meta["fitted_on"])
    return {"stage": package.name, "model": run, "fitted_on": splits.union_fitted_on(*fitted)}


@dataclass
class TrainedModel:
    """A finished run, opened to predict."""

    package: Package
    run: str
    settings: TrainingSettings
    """those that it was trained with"""
    workspace: Workspace
    """where it was found, which need not be where it was trained"""
    folder: Path
    model: PriceModel
    target: Target
    inputs: dict[str, Any]
    """the content of inputs.json: widths and encoders of the embeddings that it was trained on"""
    device: torch.device


def load_trained(package: Package, applied: EvaluateSettings) -> TrainedModel:
    """Open the finished run that `applied` names: its settings, model and target.

    Raises InputError when there is no finished run of that name.
    """
    from safetensors.torch import load_file

    workspace = Workspace(applied.workspace)
    run = applied.run or package.settings.run
    folder = workspace.path("run", name=run)
    settings = RunFolder.finished(folder, package.name).settings(package.settings)
    inputs = read_json(folder / "inputs.json")
    target = Target(settings, inputs["mean_log_price"], inputs["mean_price"])
    model = package.build_model(settings, inputs["widths"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    device = choose_device(applied.device)
    model.to(device).eval()
    return TrainedModel(package, run, settings, workspace, folder, model, target, inputs, device)


def load_for(trained: TrainedModel, split: str) -> FusionTable:
    """The table that a trained model is applied to.

    Raises InputError where an embedding file has another width or another encoder than the model was trained
    on.
    """
    widths = trained.inputs["widths"]
    table = load_table(
        trained.workspace, split, trained.package.modalities, trained.settings.use, trained_widths=widths
    )
    for name, meta in table.meta.items():
        path = trained.workspace.path("embeddings", name=name, split=split)
        if table.widths[name] != widths[name]:
            raise InputError(
                f"{path}: width {table.widths[name]}, but {trained.run} was trained with {widths[name]}"
            )
        if meta["checkpoint"] != trained.inputs["encoders"][name]:
            raise InputError(f"{path}: made by another encoder than the one {trained.run} was trained on")
    print(table.coverage())
    return table.to(trained.device)


def validation_rows(trained: TrainedModel) -> tuple[FusionTable, Tensor, str]:
    """The training table, the positions of a finished run's validation rows, and the name of a score on them.

    Raises InputError for a run without validation rows, or leaked ones unless it was trained with
    --allow-leak.
    """
    roles = splits.roles(trained.settings.holdout)
    if not roles.validate:
        raise InputError(f"{trained.run} was trained with --holdout null: no rows are left to validate on")
    table = load_for(trained, "train")
    is_leaked = check_no_leak(table, roles.validate, allow=trained.settings.allow_leak)
    return table, table.rows_in(roles.validate), "leaked" if is_leaked else "validation"


def evaluate(trained: TrainedModel) -> dict[str, Any]:
    """Score a finished run on its validation rows again, by groups; writes the table, json and plots."""
    table, rows, name = validation_rows(trained)
    price = predict(trained.model, table, rows, trained.target).double().expm1().numpy()
    scores = write_scores(trained.folder, table, rows.numpy(), price, name=name)
    print(f"{trained.folder / 'by_group.csv'}\n" + (trained.folder / "by_group.csv").read_text())
    return scores


def write_submission(trained: TrainedModel, applied: PredictSettings) -> None:
    """Price the rows of test.csv and write sample_id, price: all ids in its order, one cent or more."""
    table = load_for(trained, "test")
    rows = torch.arange(len(table.rows))
    if applied.int8:
        # one by one: in a batch, a row's price would depend a little on its neighbours
        predicted = predict(int8_copy(trained.model), table, rows, trained.target, batch_size=1)
    else:
        predicted = predict(trained.model, table, rows, trained.target)
    log_price = predicted.double().numpy()
    price = np.expm1(log_price)
    assert np.isfinite(price).all() and (price > 0).all()
    submission = table.rows[["sample_id"]].assign(price=np.round(price, 4))
    out = applied.out or trained.workspace.path("submission")
    with atomic_write(out) as file:
        submission.to_csv(file, index=False)
    write_predictions(
        trained.workspace,
        trained.run,
        "test",
        table.rows["sample_id"].to_numpy(),
        log_price,
        meta=_prediction_meta(trained.package, trained.run, splits.roles(trained.settings.holdout), table),
    )
    without_embedding = int((~table.valid.any(dim=1)).sum())
    if without_embedding:
        print(f"{without_embedding} rows have no embedding at all and get the model's constant price")
    print(f"{out}: {len(submission)} prices, median ${np.median(price):.2f}")
