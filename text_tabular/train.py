"""Train text and fields together, end to end, and score the model on rows that it has not seen.

    python -m text_tabular.train --train train.csv --columns columns.yaml --design gate --workspace OUT
    python -m text_tabular.train --train train.csv --columns columns.yaml --folds 5 --workspace OUT    # out of fold
    torchrun --nproc_per_node 4 -m text_tabular.train --fsdp …

config.py holds every setting, loop.py the training loop. --resume continues an interrupted run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from contracts.errors import run_entry_point
from contracts.files import atomic_write, read_json, write_json
from contracts.splits import Roles, roles
from contracts.workspace import Workspace
from text_tabular.config import PRESETS, TextTabularSettings
from training.run_folder import RunFolder, part_folder
from training.settings import parse_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from text_tabular.columns import ColumnRoles
    from text_tabular.data import TrainingTable
    from text_tabular.finished import Finished


def build_model(
    settings: TextTabularSettings, columns: ColumnRoles, table: TrainingTable, fit: np.ndarray
) -> Finished:
    """A model with its initial weights; vocabulary, categories and scales come from the rows to fit alone."""
    from fusion.tabular import TableColumns
    from text_tabular.encoder import choose_trained, load_encoder, load_tokenizer
    from text_tabular.finished import Finished
    from text_tabular.metrics import Calibration
    from text_tabular.model import TextTabular
    from text_tabular.texts import Chunker, with_fields

    fields = TableColumns.fit(table.rows.fields.iloc[fit])
    chunker = None
    encoder = None
    if settings.reads_text:
        messages = with_fields(table.rows.messages, table.rows.fields) if settings.fields_as_text else None
        messages = messages or table.rows.messages
        tokenizer = load_tokenizer(settings, (text for row in fit for text in messages[row]))
        chunker = Chunker(tokenizer, settings.chunk_tokens, settings.chunks)
        encoder = choose_trained(load_encoder(settings, len(tokenizer)), settings)
    model = TextTabular(settings, encoder, d_tab=fields.width, outputs=table.target.outputs)
    return Finished(settings, columns, table.target, fields, Calibration(), chunker, model)


def train_one(
    settings: TextTabularSettings,
    columns: ColumnRoles,
    table: TrainingTable,
    parts: Roles,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """Train one model into its run folder, and score it there on its validation rows."""
    from text_tabular.evaluation import HeldOut, write_scores
    from text_tabular.explain import text_shares
    from text_tabular.loop import Training, average_texts, outputs_of
    from text_tabular.metrics import Calibration
    from training.device import seed_everything
    from training.plots import plot_training_curves

    fit, stop = table.rows_in(parts.fit), table.rows_in(parts.stop)
    validate = table.rows_in(parts.validate)
    seed_everything(settings.seed)  # the same on every process, so that all start from the same weights
    trained = build_model(settings, columns, table, fit)
    model = trained.model.to(accelerator.device)
    inputs = trained.inputs(table.rows)
    if settings.reads_text and settings.tuning == "head":
        inputs.pooled = average_texts(model, inputs, settings.batch_size, accelerator.device)
    run = RunFolder(folder)
    if accelerator.is_main_process:
        files = [settings.train, settings.columns]
        run = RunFolder.start(
            folder, settings, inputs=files, resume=settings.resume, report_to=settings.report_to
        )
        weights = sum(weight.numel() for weight in model.parameters())
        learned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        print(
            f"{weights:,} parameters, {learned:,} of them trained; {len(fit)} rows to fit, {len(stop)} to stop on, "
            f"{len(validate)} to validate"
        )
    accelerator.wait_for_everyone()
    training = Training(settings, model, inputs, table.values, table.target, run, accelerator)
    training.fit(fit, stop, epochs=settings.epochs)

    if table.target.task == "classification":
        logits = outputs_of(model, inputs, stop, settings.batch_size, accelerator).numpy()
        trained.calibration = Calibration.fit(logits, table.values[stop])
    held_out = None
    if len(validate):
        outputs = outputs_of(model, inputs, validate, settings.batch_size, accelerator).numpy()
        shares = text_shares(model, inputs, validate, settings.batch_size)
        held_out = HeldOut(outputs, table.values[validate], shares)
    weights_of_all = training.full_weights()
    if accelerator.is_main_process:
        trained.save(folder, weights_of_all)
        summary: dict[str, Any] = {"epoch": training.best.epoch, "stop_loss": training.best.score}
        if held_out is not None:
            summary |= write_scores(folder, held_out, table.target, trained.calibration)
        plot_training_curves(folder / "training_curves.png", run.metrics(), title=settings.run)
        # what scores the run again asks for its rows, so they are there before it counts as finished
        folds = dict(zip(table.rows.ids.tolist(), table.fold.tolist(), strict=True))
        write_json(folder / "folds.json", folds)
        run.finish(**summary)
    accelerator.wait_for_everyone()


def train_out_of_fold(
    settings: TextTabularSettings,
    columns: ColumnRoles,
    table: TrainingTable,
    folder: Path,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """One model per hold-out and one of all rows; predictions of every row by the model that has not seen it."""
    from text_tabular.evaluation import HeldOut, write_scores
    from text_tabular.finished import Finished
    from text_tabular.metrics import Calibration

    run = RunFolder(folder)
    if accelerator.is_main_process:
        files = [settings.train, settings.columns]
        run = RunFolder.start(folder, settings, inputs=files, resume=settings.resume)
    accelerator.wait_for_everyone()
    priced = []
    collected = []
    for holdout in (*range(settings.folds), None):
        part = folder / part_folder(holdout)
        parts = roles(holdout, settings.folds)
        of_part = replace(
            settings, folds=0, run=f"{settings.run}/{part.name}", resume=settings.resume and part.is_dir()
        )
        accelerator.print(f"\n{part.name}")
        if not RunFolder(part).already_complete(settings.resume):
            train_one(of_part, columns, table, parts, part, accelerator)
        rows = table.rows_in(parts.validate)
        if not len(rows):
            continue
        trained = Finished.open(part, settings.device)
        held_out = trained.held_out(table, rows)
        described = trained.described(table.rows.ids[rows], held_out.outputs)
        described.insert(1, "fold", table.fold[rows])
        priced.append(described)
        # every model has a temperature of its own, so logits are compared after it
        scale = trained.calibration.temperature
        collected.append(HeldOut(held_out.outputs / scale, held_out.values, held_out.text_share))
    everything = HeldOut(
        np.concatenate([part.outputs for part in collected]),
        np.concatenate([part.values for part in collected]),
        np.concatenate([part.text_share for part in collected]),
    )
    scores: dict[str, Any] = {}
    if accelerator.is_main_process:
        with atomic_write(folder / "out_of_fold.csv") as file:
            pd.concat(priced).to_csv(file, index=False)
        scores = write_scores(folder, everything, table.target, Calibration())
        run.finish(**scores)
    return scores


def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(TextTabularSettings, argv, description=__doc__.split("\n")[0], presets=PRESETS)
    from text_tabular.columns import ColumnRoles
    from text_tabular.data import TrainingTable
    from training.device import build_accelerator, choose_device

    columns = ColumnRoles.read(settings.columns)
    check_sides(settings, columns)
    folder = Workspace(settings.workspace).path("run", name=settings.run)
    if RunFolder(folder).already_complete(settings.resume, settings, [settings.train, settings.columns]):
        return read_json(folder / "summary.json")
    table = TrainingTable.read(settings, columns)
    accelerator = build_accelerator(choose_device(settings.device), settings.precision)
    if settings.folds:
        scores = train_out_of_fold(settings, columns, table, folder, accelerator)
    else:
        train_one(settings, columns, table, roles(settings.holdout), folder, accelerator)
        scores = read_json(folder / "summary.json") if accelerator.is_main_process else {}
    if accelerator.is_main_process:
        listed = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        print(f"{folder}: {listed}")
    accelerator.end_training()
    return scores


def check_sides(settings: TextTabularSettings, columns: ColumnRoles) -> None:
    """Raise InputError for a design that reads a side which the table does not have."""
    from contracts.errors import InputError

    needs_fields = settings.design not in ("text",) or settings.fields_as_text
    if settings.reads_text and not columns.text:
        raise InputError(f"{settings.columns}: no text column; use --design tabular, or name one under text")
    if needs_fields and not columns.fields:
        raise InputError(
            f"{settings.columns}: neither numeric nor category columns; use --design text, or name some"
        )


if __name__ == "__main__":
    run_entry_point(main)
