"""Settings of the ensemble: every default once."""

from __future__ import annotations

from dataclasses import dataclass

from contracts.workspace import REPOSITORY


@dataclass
class EnsembleSettings:
    workspace: str = str(REPOSITORY)
    """Folder with predictions/."""
    members: tuple[str, ...] = ()
    """Names of prediction files to combine; empty means every one that has a price for all rows."""
    name: str = "ensemble"
    """Name of the combined predictions, and of the folder under checkpoints/ with weights and scores."""
    out: str = ""
    """Where the test prices go; empty means test_out.csv in the workspace."""
    intervals: bool = False
    """Also write 80 % and 95 % price intervals, to test_intervals.csv beside test_out.csv."""
