"""Answer every question about a table: attributes with confidence for people, columns for the price models.

    python -m attributes.extract_attributes --run attributes_dpo --listings train --workspace OUT

Writes attributes/attributes_<table>.csv, a page to look at, and, where the workspace has folds,
data/embeddings/attributes_<table>.pkl. An interrupted extraction continues where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from attributes.config import ExtractSettings
from attributes.evaluate import CALIBRATION
from attributes.sample_chains import finished_run
from contracts.embeddings import Embeddings, write_embeddings
from contracts.errors import run_entry_point
from contracts.files import atomic_write, read_json
from contracts.splits import fitted_on, split_hash
from contracts.workspace import Workspace
from training.settings import parse_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attributes.data import Listing
    from attributes.metrics import Calibration
    from attributes.schema import Schema
    from attributes.shards import Answered

NAME = "attributes"
"""Of the embedding file."""


def read_calibration(folder: Path) -> Calibration:
    from attributes.metrics import Calibration

    if not (folder / CALIBRATION).is_file():
        print(
            "not calibrated: confidence is consistency; attributes.evaluate --calibration-labels calibrates"
        )
        return Calibration.none()
    content = read_json(folder / CALIBRATION)
    return Calibration(tuple(content["consistency"]), tuple(content["probability"]))


def describe(answered: Sequence[Answered], calibration: Calibration, min_consistency: float) -> pd.DataFrame:
    """sample_id, attribute, value, consistency, confidence, abstained; one row per question.

    An answer is withheld where the chains agree too little, tie, or say unknown; its value is still shown.
    """
    from attributes.schema import UNKNOWN

    rows = []
    for each in answered:
        agreed = each.consensus
        value = agreed.value
        abstained = value is None or value == UNKNOWN or agreed.consistency < min_consistency
        confidence = 0.0 if value is None else float(calibration(np.array(agreed.consistency)))
        rows.append(
            {
                "sample_id": each.question.listing.sample_id,
                "attribute": each.question.attribute.name,
                "value": value or "",
                "consistency": round(agreed.consistency, 4),
                "confidence": round(confidence, 4),
                "abstained": abstained,
            }
        )
    return pd.DataFrame(rows)


def as_columns(
    described: pd.DataFrame, listings: Sequence[Listing], schema: Schema
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Confidence of every closed value, (N, columns) float32; which listings have an answer, (N,) bool; names.

    The column of the answer holds its confidence, and every other one 0; all are 0 where the answer is withheld.
    """
    columns = schema.columns()
    place = {(vertical, name, value): at for at, (_, vertical, name, value) in enumerate(columns)}
    row_of = {listing.sample_id: row for row, listing in enumerate(listings)}
    matrix = np.zeros((len(listings), len(columns)), np.float32)
    for sample_id, name, value, confidence, abstained in described[
        ["sample_id", "attribute", "value", "confidence", "abstained"]
    ].itertuples(index=False):
        row = row_of[sample_id]
        at = place.get((listings[row].vertical, name, value))
        if at is not None and not abstained:
            matrix[row, at] = confidence
    return matrix, matrix.any(axis=1), [column[0] for column in columns]


def write_columns(
    settings: ExtractSettings, table: str, described: pd.DataFrame, listings: Sequence[Listing], schema: Schema,
    checkpoint: str, model: str,
) -> Path | None:  # fmt: skip
    """The embedding file that price models read; None where the workspace has no folds, or the schema no values."""
    workspace = Workspace(settings.workspace)
    if not workspace.path("folds").is_file() or not schema.columns():
        return None
    matrix, valid, names = as_columns(described, listings, schema)
    meta = {
        "name": NAME, "split": table, "stage": "attributes", "run": settings.run, "model": model,
        "checkpoint": checkpoint,
        # labels of attributes are all that the model has learned from; it has never seen a price
        "fitted_on": fitted_on(encoder_folds=()),
        "split_hash": split_hash(workspace.folds()), "command": " ".join(sys.argv), "last_columns": names,
    }  # fmt: skip
    path = workspace.path("embeddings", name=NAME, split=table)
    ids = np.array([listing.sample_id for listing in listings], np.str_)
    write_embeddings(path, Embeddings(ids, matrix, valid, meta))
    return path


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ExtractSettings, argv, description=__doc__.split("\n")[0])
    folder = finished_run(settings)
    from attributes.data import read_listings
    from attributes.gallery import write_gallery
    from attributes.model import SCHEMA_FILE, adapter_hash, open_run
    from attributes.schema import Schema
    from attributes.shards import ChainShards, chains_folder
    from training.device import choose_device
    from training.processes import process, process_group

    table = read_listings(settings, Schema.read(str(folder / SCHEMA_FILE)))
    device = choose_device(settings.device)
    with process_group(device):
        language, schema = open_run(folder, images=table.images, device=device, precision=settings.precision)
        # apart from the chains for training, which leave the labelled listings out
        place = chains_folder(settings.workspace, settings.run, f"{table.name}_all", settings.round)
        adapter = adapter_hash(folder)
        shards = ChainShards(place, language, adapter, settings, schema)
        shards.complete(table.listings)
        if process()[0] != 0:
            return
        answered = shards.finish(table.listings)
    described = describe(answered, read_calibration(folder), settings.min_consistency)
    path = settings.workspace / "attributes" / f"attributes_{table.name}.csv"
    with atomic_write(path) as file:
        described.to_csv(file, index=False)
    withheld = described["abstained"].mean()
    print(f"{path}: {len(described)} answers about {len(table.listings)} listings, {withheld:.0%} withheld")
    columns = write_columns(
        settings, table.name, described, table.listings, schema, adapter, language.spec.model
    )
    print(
        f"{columns}: columns for the price models"
        if columns
        else "no folds in this workspace: no columns written"
    )
    if settings.gallery:
        page = settings.workspace / "attributes" / f"gallery_{table.name}.html"
        write_gallery(page, answered, described, table.images, listings=settings.gallery)
        print(f"{page}: listings to look at")


if __name__ == "__main__":
    run_entry_point(main)
