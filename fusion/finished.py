"""Finished runs, opened to price the rows of a table, to be scored again and to be explained.

A run folder holds one model (model.safetensors and inputs.json), or several that differ in their seed (seed_0, seed_1,
…), of which the mean counts. In `all` it may also hold the model of all rows, which prices every other table. An
out-of-fold run holds no model of its own, but one per hold-out (fold_0, fold_1, …), and `all`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from contracts import splits
from contracts.embeddings import Embeddings
from contracts.errors import InputError, listed
from contracts.files import read_json
from contracts.predictions import write_in_input_order, write_predictions
from contracts.workspace import Workspace
from fusion.blocks import PriceModel
from fusion.config import (
    TABULAR,
    EvaluateSettings,
    Package,
    PredictSettings,
    SubmitSettings,
    TrainingSettings,
    seed_folder,
)
from fusion.dataset import FusionTable, check_no_leak, load_table, table_in_memory
from fusion.evaluation import gate_shares, write_scores
from fusion.int8 import int8_copy
from fusion.loop import predict
from fusion.seeds import SeedAverage
from fusion.tabular import TableColumns
from fusion.target import Target
from training.device import choose_device
from training.run_folder import RunFolder, part_folder
from training.sealed import require_whole
from training.weights import read_weights

INPUTS = "inputs.json"
"""What a model was trained on: widths and encoders of the embeddings, the columns of the table. Written behind the
weights, so a folder that has it has the whole model."""

WEIGHTS = "model.safetensors"


@dataclass
class TrainedModel:
    """The model of a finished run, or the mean of several that differ in their seed, opened to predict."""

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
    """the content of inputs.json"""
    device: torch.device

    @property
    def embedding_widths(self) -> dict[str, int]:
        """D_in of the embeddings that it was trained on, in its order."""
        return {name: width for name, width in self.inputs["widths"].items() if name != TABULAR}

    @cached_property
    def columns(self) -> TableColumns | None:
        """How it reads the feature columns of the table; None where it does not."""
        content = self.inputs.get(TABULAR)
        return TableColumns.from_json(content) if content else None

    def table_of(self, rows: pd.DataFrame, embeddings: dict[str, Embeddings]) -> FusionTable:
        """What it needs to price prepared rows (N) whose embeddings are at hand, on its device."""
        table = table_in_memory(rows, embeddings, self.embedding_widths)
        return table.with_tabular(self.columns).to(self.device)

    def log_price(self, table: FusionTable, rows: Tensor | None = None) -> np.ndarray:
        """log1p of dollars, float64, of `rows` (n,) of a table that it needs (N,); None is all rows."""
        if rows is None:
            rows = torch.arange(len(table.rows))
        return predict(self.model, table, rows, self.target).double().numpy()


def load_trained(package: Package, applied: EvaluateSettings) -> TrainedModel:
    """Open the model of the run that `applied` names, the one that was validated.

    Raises:
        InputError: there is no finished run of that name, or it is out of fold and has several models.
    """
    workspace = Workspace(applied.workspace)
    run = applied.run or package.settings.run
    folder = RunFolder.finished(workspace.path("run", name=run), package.name).path
    if is_out_of_fold(folder):
        raise InputError(
            f"{folder}: has one model per hold-out; choose one, such as --run {run}/{part_folder(0)}"
        )
    return open_model(package, workspace, run, choose_device(applied.device))


def load_for_new_rows(package: Package, applied: EvaluateSettings) -> TrainedModel:
    """Open the model of the run that prices other tables: that of all rows, where there is one.

    Raises InputError when there is no finished run of that name.
    """
    workspace = Workspace(applied.workspace)
    run = applied.run or package.settings.run
    folder = RunFolder.finished(workspace.path("run", name=run), package.name).path
    part = f"{run}/{part_folder(None)}" if (folder / part_folder(None)).is_dir() else run
    return open_model(package, workspace, part, choose_device(applied.device))


def is_out_of_fold(folder: Path) -> bool:
    """Whether the run has one model per hold-out."""
    return (folder / part_folder(0)).is_dir()


def open_model(package: Package, workspace: Workspace, run: str, device: torch.device) -> TrainedModel:
    """The model in a folder of a run, or the mean of those in its seed folders.

    Raises InputError where one of its files is damaged.
    """
    folder = workspace.path("run", name=run)
    settings = RunFolder(folder).settings(package.settings)
    folders = [folder]
    if settings.seeds > 1:
        folders = [folder / seed_folder(number) for number in range(settings.seeds)]
    for one in (folder, *folders):
        require_whole(one)
    inputs = read_json(folders[0] / INPUTS)
    target = Target(settings, inputs["mean_log_price"], inputs["mean_price"])
    models = []
    for of_seed in folders:
        model = package.build_model(settings, inputs["widths"])
        model.load_state_dict(read_weights(of_seed / WEIGHTS))
        models.append(model)
    whole = models[0] if len(models) == 1 else SeedAverage(models, target)
    whole.to(device).eval()
    return TrainedModel(package, run, settings, workspace, folder, whole, target, inputs, device)


def load_for(trained: TrainedModel, split: str) -> FusionTable:
    """The table that a trained model is applied to, with all that it reads of it.

    Raises InputError where an embedding file has another width or another encoder than the model was trained
    on.
    """
    table = load_embeddings_for(trained, split).with_tabular(trained.columns)
    print(table.coverage())
    return table


def load_embeddings_for(trained: TrainedModel, split: str) -> FusionTable:
    """The same without the table's own columns, which each model reads in its own way."""
    widths = trained.embedding_widths
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
    return table.to(trained.device)


def validation_rows(trained: TrainedModel) -> tuple[FusionTable, Tensor, str]:
    """The training table, the positions of a finished run's validation rows, and the name of a score on them.

    Raises InputError for a run without validation rows, or leaked ones unless it was trained with
    --allow-leak.
    """
    table = load_for(trained, "train")
    name = name_of_score([trained], table)
    return table, table.rows_in(trained.settings.roles.validate), name


def name_of_score(models: list[TrainedModel], table: FusionTable) -> str:
    """What a score of models, each on its validation rows, may be called: "validation" or "leaked".

    Raises InputError where there are no such rows, or leaked ones that the run did not ask for.
    """
    validate: tuple[int, ...] = ()
    for trained in models:
        validate += trained.settings.roles.validate
    first = models[0]
    if not validate:
        raise InputError(f"{first.run} was trained with --holdout null: no rows are left to validate on")
    return "leaked" if check_no_leak(table, validate, allow=first.settings.allow_leak) else "validation"


def evaluate(package: Package, applied: EvaluateSettings) -> dict[str, Any]:
    """Score a finished run on its validation rows again, by groups; writes the table, json and plots."""
    workspace = Workspace(applied.workspace)
    run = applied.run or package.settings.run
    folder = RunFolder.finished(workspace.path("run", name=run), package.name).path
    parts = [run]
    if is_out_of_fold(folder):
        folds = RunFolder(folder).settings(package.settings).folds
        parts = [f"{run}/{part_folder(holdout)}" for holdout in range(folds)]
    device = choose_device(applied.device)
    models = [open_model(package, workspace, part, device) for part in parts]
    table = load_embeddings_for(models[0], "train")
    name = name_of_score(models, table)

    rows_of_models = []
    log_prices = []
    for trained in models:
        rows = table.rows_in(trained.settings.roles.validate)
        seen = table.with_tabular(trained.columns)
        rows_of_models.append(rows.numpy())
        log_prices.append(trained.log_price(seen, rows))
    # the experts of different models have nothing to do with each other
    gate = gate_shares(trained.model, seen, rows) if len(models) == 1 else None
    price = np.expm1(np.concatenate(log_prices))
    scores = write_scores(folder, table, np.concatenate(rows_of_models), price, name=name, gate=gate)
    print(f"{folder / 'by_group.csv'}\n" + (folder / "by_group.csv").read_text())
    return scores


def price_table(trained: TrainedModel, table: FusionTable, *, int8: bool) -> np.ndarray:
    """log1p of dollars (N,) of every row of a table that the model needs."""
    if not int8:
        return trained.log_price(table)
    rows = torch.arange(len(table.rows))
    # one by one: in a batch, a row's price would depend a little on its neighbours
    predicted = predict(int8_copy(trained.model), table, rows, trained.target, batch_size=1)
    return predicted.double().numpy()


def write_prices(package: Package, applied: PredictSettings, split: str) -> pd.DataFrame:
    """Price the rows of a prepared table and write predictions/<run>_<split>.csv.

    Returns:
        sample_id and price in dollars, rows as in the table.

    Raises:
        InputError: the training table, whose prices the run itself has written.
    """
    if split == "train":
        raise InputError(
            "train: the model was fitted on these rows; training wrote the prices of unseen ones"
        )
    run = applied.run or package.settings.run
    trained = load_for_new_rows(package, applied)
    table = load_for(trained, split)
    log_price = price_table(trained, table, int8=applied.int8)
    price = np.expm1(log_price)
    usable = np.isfinite(price) & (price > 0)
    if not usable.all():
        ids = table.rows["sample_id"].to_numpy()[~usable].tolist()
        raise InputError(
            f"{run}: no price above 0 for sample_id {listed(ids)}; train it again with a lower --lr"
        )
    path = write_predictions(
        trained.workspace,
        run,
        split,
        table.rows["sample_id"].to_numpy(),
        log_price,
        meta=prediction_meta(
            package, run, splits.fitted_on(encoder_folds=trained.settings.roles.fitted_on), table
        ),
    )
    without_embedding = int((~table.valid.any(dim=1)).sum())
    if without_embedding:
        print(f"{without_embedding} rows have no embedding at all and get the model's constant price")
    print(f"{path}: {len(price)} prices, median {np.median(price):.2f}")
    return table.rows[["sample_id"]].assign(price=price)


def write_submission(package: Package, applied: SubmitSettings) -> None:
    """Price the rows of test.csv and write sample_id, price for each of its lines, in its order."""
    workspace = Workspace(applied.workspace)
    prices = write_prices(package, applied, "test")
    out = applied.out or workspace.path("submission")
    write_in_input_order(workspace, "test", prices.assign(price=prices["price"].round(4)), out)
    print(f"{out}: {len(workspace.input_ids('test'))} prices")


def prediction_meta(
    package: Package, run: str, model_fitted_on: list[list[int]], table: FusionTable
) -> dict[str, Any]:
    """What a prediction file says of its origin: the folds of the model and of the encoders that it used."""
    fitted = [model_fitted_on]
    for meta in table.meta.values():
        fitted.append(meta["fitted_on"])
    return {"stage": package.name, "model": run, "fitted_on": splits.union_fitted_on(*fitted)}
