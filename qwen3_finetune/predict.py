"""Predict prices with a finished run.

    python -m qwen3_finetune.predict train     # predictions/qwen3_finetune_train.csv: sample_id, log_price, fold
    python -m qwen3_finetune.predict test      # predictions/qwen3_finetune_test.csv: sample_id, log_price
    python -m qwen3_finetune.predict new       # any further table that data.prepare has made

A run was fitted on most training rows, and only its predictions for its validation folds are honest. The json beside
the file says which folds these are. For an out-of-fold run (--folds), all predictions are honest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from contracts.errors import run_entry_point
from contracts.predictions import write_predictions
from contracts.workspace import Workspace
from qwen3_finetune.config import ApplySettings
from qwen3_finetune.data import TextRows, read_rows
from qwen3_finetune.encoder import Encoder
from qwen3_finetune.finished import finished_folder, prices_fitted_on
from training.settings import parse_settings
from training.weights import weights_hash


def write_prices(
    workspace: Workspace, run_name: str, split: str, rows: TextRows, log_price: np.ndarray
) -> Path:
    """Write the prediction file of a run: log_price is (N,), log1p of dollars."""
    run = finished_folder(workspace, run_name)
    meta = {
        "stage": "qwen3_finetune",
        "model": run_name,
        "checkpoint": weights_hash(run.path),
        "fitted_on": prices_fitted_on(run),
    }
    return write_predictions(
        workspace, run_name, split, rows.sample_ids, log_price, meta=meta, fold=rows.fold
    )


def main(argv: Sequence[str] | None = None) -> None:
    settings, split = parse_settings(
        ApplySettings, argv, description=__doc__.split("\n")[0], positional={"table": None}
    )
    workspace = Workspace(settings.workspace)
    rows = read_rows(workspace, split)
    encoder = Encoder.open(
        finished_folder(workspace, settings.run).path,
        device=settings.device,
        precision=settings.precision,
        tokens_per_batch=settings.tokens_per_batch,
    )
    _, log_price = encoder.encode_rows(rows)
    path = write_prices(workspace, settings.run, split, rows, log_price)
    print(f"{path}: {len(rows)} rows, median price ${np.expm1(np.median(log_price)):.2f}")


if __name__ == "__main__":
    run_entry_point(main)
