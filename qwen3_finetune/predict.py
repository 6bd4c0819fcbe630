"""Predict prices with a finished run.

    python -m qwen3_finetune.predict train     # predictions/qwen3_finetune_train.csv: sample_id, log_price, fold
    python -m qwen3_finetune.predict test      # predictions/qwen3_finetune_test.csv: sample_id, log_price

In train most rows are rows that the run was fitted on; only those of its validation folds are honest predictions. An
out-of-fold run (--folds) has not seen any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contracts.errors import run_entry_point
from contracts.files import atomic_write
from contracts.workspace import SPLITS, Workspace
from qwen3_finetune.config import ApplySettings
from qwen3_finetune.data import predictions_table, read_rows
from qwen3_finetune.finished import open_run
from training.settings import parse_settings


def main(argv: Sequence[str] | None = None) -> None:
    settings, split = parse_settings(
        ApplySettings, argv, description=__doc__.split("\n")[0], positional={"split": SPLITS}
    )
    workspace = Workspace(settings.workspace)
    rows = read_rows(workspace, split)
    _, log_price = open_run(settings).encode(rows)
    path = workspace.path("predictions", name=settings.run, split=split)
    with atomic_write(path) as file:
        predictions_table(rows, log_price).to_csv(file, index=False)
    print(f"{path}: {len(rows)} rows, median price ${np.expm1(np.median(log_price)):.2f}")


if __name__ == "__main__":
    run_entry_point(main)
