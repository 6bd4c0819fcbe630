"""The tables that studies write: where they go, and how runs with different seeds are summed up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.files import atomic_write
from contracts.workspace import REPOSITORY

RESULTS = REPOSITORY / "studies" / "results"
"""Folder of the committed results."""


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Sample standard deviation of the runs; 0 for a single run."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a study's csv, with two decimals."""
    with atomic_write(path) as file:
        table.to_csv(file, index=False, float_format="%.2f")
