"""Combine the members' prices of a table by the weights of a fitted ensemble.

    python -m ensemble.predict test --workspace OUT      # test_out.csv and test_intervals.csv
    python -m ensemble.predict new --workspace OUT       # new_out.csv and new_intervals.csv

Every member must have priced the table before: predictions/<member>_<table>.csv.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from contracts.predictions import Predictions, read_predictions, write_in_input_order, write_predictions
from contracts.splits import N_FOLDS, fitted_on
from contracts.workspace import REPOSITORY, Workspace
from ensemble.saved import Ensemble
from training.settings import parse_settings


@dataclass
class PredictSettings:
    workspace: Path = REPOSITORY
    """Folder with checkpoints/ and predictions/."""
    run: str = "ensemble"
    """Name of the fitted ensemble under checkpoints/."""


def ln_prices_of(predictions: Predictions, ids: pd.Index) -> np.ndarray:
    """(N,) ln prices in the order of `ids`. Raises InputError for a file that lacks rows."""
    by_id = predictions.by_id
    missing = ids.difference(by_id.index)
    if len(missing):
        raise InputError(
            f"{predictions.path}: no prediction for {len(missing)} rows, first {missing[0]}; it is not out of fold"
        )
    return np.log(by_id[ids].to_numpy())


def write_prices(
    workspace: Workspace,
    run: str,
    ensemble: Ensemble,
    table: str,
    ln_predicted: np.ndarray,
    out: Path | None = None,
) -> None:
    """Write the prices, the intervals beside them, and the prediction file.

    Args:
        ln_predicted: (N, J) ln prices of the members, in the order of the prepared table.
        out: file for the prices; None is <table>_out.csv in the workspace.
    """
    ids = workspace.prepared(table)["sample_id"].to_numpy()
    prices = ensemble.prices(ids, ln_predicted)
    out = out or workspace.root / f"{table}_out.csv"
    intervals = out.with_name(f"{out.stem.removesuffix('_out')}_intervals.csv")
    for path, columns in ((out, ["sample_id", "price"]), (intervals, list(prices))):
        write_in_input_order(workspace, table, prices[columns], path)
    meta = {
        "stage": "ensemble",
        "model": run,
        "members": [member.name for member in ensemble.members],
        "fitted_on": fitted_on(encoder_folds=tuple(range(N_FOLDS))),
    }
    log_price = np.log1p(np.exp(ensemble.ln_price(ln_predicted)))
    write_predictions(workspace, run, table, ids, log_price, meta=meta)
    error = ensemble.expected_error
    print(
        f"{out}: {len(prices)} prices, median {prices['price'].median():.2f}"
        + (f"; {error}" if error else "")
    )


def main(argv: list[str] | None = None) -> None:
    settings, table = parse_settings(
        PredictSettings, argv, description=__doc__.split("\n")[0], positional={"table": None}
    )
    workspace = Workspace(settings.workspace)
    ensemble = Ensemble.load(workspace.path("run", name=settings.run))
    ids = pd.Index(workspace.prepared(table)["sample_id"])
    columns = [
        ln_prices_of(read_predictions(workspace, member.name, table), ids) for member in ensemble.members
    ]
    write_prices(workspace, settings.run, ensemble, table, np.stack(columns, axis=1))


if __name__ == "__main__":
    run_entry_point(main)
