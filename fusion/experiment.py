"""One protocol for every fusion model: fit, stop and validate on rows that were kept apart from the start.

The encoders behind the embeddings fitted on the same `fit` and `stop` folds, so the `validate` rows are new to
the whole system; a score on rows that any encoder has seen is refused (or called leaked, on request).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from contracts import splits
from contracts.errors import InputError
from contracts.files import atomic_write, read_json, write_json
from contracts.workspace import Workspace
from fusion.config import TrainingSettings
from fusion.dataset import FusionTable, check_no_leak, embedding_files, load_table
from fusion.evaluation import write_scores
from fusion.loop import Target, predict, train
from fusion.processes import process, process_group
from training.device import choose_device, seed_everything
from training.plots import plot_training_curves
from training.run_folder import RunFolder

BuildModel = Callable[[Any, dict[str, int]], nn.Module]


@dataclass
class TrainingData:
    table: FusionTable
    roles: splits.Roles
    leaked: bool
    """whether an encoder was fitted on rows to validate on"""
    inputs: list[Path]


def build_data(settings: TrainingSettings, modalities: tuple[str, ...]) -> TrainingData:
    """Load the training table onto the device and check that validating on its held-out rows is honest."""
    workspace, roles = Workspace(settings.workspace), splits.roles(settings.holdout)
    table = load_table(workspace, "train", modalities, settings.use)
    leaked = check_no_leak(table, roles.validate, allow=settings.allow_leak)
    used = embedding_files(workspace, "train", settings.use or modalities)
    inputs = [workspace.path("prepared", split="train"), workspace.path("folds"), *used]
    return TrainingData(table.to(choose_device(settings.device)), roles, leaked, inputs)


def fit_and_score(settings: TrainingSettings, data: TrainingData, build_model: BuildModel) -> dict[str, Any]:
    """Train, keep the best weights, score them on the validation rows, leave everything in the run folder."""
    workspace = Workspace(settings.workspace)
    folder = workspace.path("run", name=settings.run)
    if settings.resume and (folder / "COMPLETE").is_file():
        print(f"{folder}: already complete")
        return read_json(folder / "summary.json")
    with process_group(data.table.valid.device):
        return _fit_and_score(settings, data, build_model, workspace, folder)


def _fit_and_score(
    settings: TrainingSettings,
    data: TrainingData,
    build_model: BuildModel,
    workspace: Workspace,
    folder: Path,
) -> dict[str, Any]:
    first = process()[0] == 0  # the others only compute
    seed_everything(settings.seed)
    model = build_model(settings, data.table.widths)
    run = None
    if first:
        run = RunFolder.start(
            folder, settings, inputs=data.inputs, resume=settings.resume, report_to=settings.report_to
        )
    fit, stop = data.table.rows_in(data.roles.fit), data.table.rows_in(data.roles.stop)
    target = Target.of(settings, data.table.log_price[fit])
    model.set_output_bias(target.output_bias)
    model.to(data.table.valid.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if first:
        print(data.table.coverage())
        print(f"{parameters:,} parameters; {len(fit)} rows to fit, {len(stop)} to stop on")
    outcome = train(model, data.table, fit, stop, settings, run)
    summary = {"parameters": parameters, **outcome}
    if run is None:
        return summary

    _save_model(folder, model, data.table, target)
    plot_training_curves(folder / "training_curves.png", run.metrics(), title=settings.run)
    if data.roles.validate:
        summary |= _validate(workspace, settings, data, model, target)
    run.finish(**summary)
    return summary


def _validate(workspace: Workspace, settings: TrainingSettings, data: TrainingData, model, target) -> dict:
    rows = data.table.rows_in(data.roles.validate)
    log_price = predict(model, data.table, rows, target).double().numpy()
    name = "leaked" if data.leaked else "validation"
    if not data.leaked:
        frame = data.table.rows.iloc[rows.numpy()]
        predictions = frame[["sample_id"]].assign(log_price=log_price, fold=frame["fold"])
        with atomic_write(workspace.path("predictions", name=settings.run, split="train")) as file:
            predictions.to_csv(file, index=False)
    folder = workspace.path("run", name=settings.run)
    scores = write_scores(folder, data.table, rows.numpy(), np.expm1(log_price), name=name)
    print(
        f"{name} SMAPE {scores[f'{name}_smape']:.2f} ± {scores['standard_error']:.2f} on {scores['rows']} rows"
    )
    return scores


def _save_model(folder: Path, model: nn.Module, table: FusionTable, target: Target) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    inputs = {
        "widths": table.widths,
        "encoders": {name: meta["checkpoint"] for name, meta in table.meta.items()},
        "mean_price": target.mean_price,
        "mean_log_price": target.mean_log_price,
    }
    write_json(folder / "inputs.json", inputs)


@dataclass
class TrainedModel:
    settings: Any
    model: nn.Module
    target: Target
    folder: Path
    device: torch.device


def load_trained(
    workspace: Workspace, run: str, stage: str, settings_class: type, build_model: BuildModel, device: str
) -> TrainedModel:
    """Open a finished run: its settings, model and target."""
    from safetensors.torch import load_file

    folder = RunFolder.finished(workspace.path("run", name=run), stage)
    settings, inputs = folder.settings(settings_class), read_json(folder.path / "inputs.json")
    model = build_model(settings, inputs["widths"])
    model.load_state_dict(load_file(folder.path / "model.safetensors"))
    chosen = choose_device(device)
    target = Target(settings, inputs["mean_log_price"], inputs["mean_price"])
    return TrainedModel(settings, model.to(chosen).eval(), target, folder.path, chosen)


def load_for(
    trained: TrainedModel, workspace: Workspace, split: str, modalities: tuple[str, ...]
) -> FusionTable:
    """The table a trained model is applied to.

    Raises InputError where an embedding file has another width or another encoder than the model was trained on.
    """
    expected = read_json(trained.folder / "inputs.json")
    table = load_table(workspace, split, modalities, trained.settings.use, expected["widths"])
    for name, width in expected["widths"].items():
        path = workspace.path("embeddings", name=name, split=split)
        if name not in table.meta:  # left out by --use
            continue
        if table.widths[name] != width:
            raise InputError(
                f"{path}: width {table.widths[name]}, but {trained.folder.name} was trained with {width}"
            )
        if table.meta[name]["checkpoint"] != expected["encoders"][name]:
            raise InputError(
                f"{path}: made by another encoder than the one {trained.folder.name} was trained on"
            )
    print(table.coverage())
    return table.to(trained.device)


def validation_rows(
    trained: TrainedModel, workspace: Workspace, modalities: tuple[str, ...]
) -> tuple[FusionTable, torch.Tensor, str]:
    """The training table, the positions of a finished run's validation rows, and what a score on them is called.

    Raises InputError for a run without validation rows, or leaked ones unless it was trained with --allow-leak.
    """
    roles = splits.roles(trained.settings.holdout)
    if not roles.validate:
        raise InputError(
            f"{trained.folder.name} was trained with --holdout null: no rows are left to validate on"
        )
    table = load_for(trained, workspace, "train", modalities)
    leaked = check_no_leak(table, roles.validate, allow=trained.settings.allow_leak)
    return table, table.rows_in(roles.validate), "leaked" if leaked else "validation"


def evaluate(trained: TrainedModel, workspace: Workspace, modalities: tuple[str, ...]) -> dict:
    """Score a finished run on its validation rows again, by groups; writes the table, json and plots."""
    table, rows, name = validation_rows(trained, workspace, modalities)
    price = predict(trained.model, table, rows, trained.target).double().expm1().numpy()
    scores = write_scores(trained.folder, table, rows.numpy(), price, name=name)
    print(f"{trained.folder / 'by_group.csv'}\n" + (trained.folder / "by_group.csv").read_text())
    return scores


def write_submission(
    trained: TrainedModel, workspace: Workspace, modalities: tuple[str, ...], out: Path
) -> None:
    """Predict every row of test.csv and write sample_id,price: all ids, in its order, finite, > 0."""
    table = load_for(trained, workspace, "test", modalities)
    log_price = predict(trained.model, table, torch.arange(len(table.rows)), trained.target).double().numpy()
    price = np.expm1(log_price)
    assert np.isfinite(price).all() and (price > 0).all()
    submission = table.rows[["sample_id"]].assign(price=np.round(price, 4))
    with atomic_write(out) as file:
        submission.to_csv(file, index=False)
    predictions = table.rows[["sample_id"]].assign(log_price=log_price)
    with atomic_write(workspace.path("predictions", name=trained.folder.name, split="test")) as file:
        predictions.to_csv(file, index=False)
    nothing = int((~table.valid.any(dim=1)).sum())
    if nothing:
        print(f"{nothing} rows have no embedding at all and get the model's constant price")
    print(f"{out}: {len(submission)} prices, median ${np.median(price):.2f}")
