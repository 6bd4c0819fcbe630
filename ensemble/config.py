"""Settings of the ensemble: every default once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from contracts.workspace import REPOSITORY


@dataclass
class EnsembleSettings:
    workspace: Path = REPOSITORY
    """Folder with data/ and predictions/."""
    members: tuple[str, ...] = ()
    """Names of the prediction files to combine; empty means every model that priced all rows out of fold. Models of a
    single hold-out must be named; they are weighed on its rows."""
    run: str = "ensemble"
    """Name of the combined predictions, and of the folder under checkpoints/ with weights and scores."""
    out: str = ""
    """File that receives the test prices; empty means test_out.csv in the workspace. The intervals go beside it."""
    allow_leak: bool = False
    """Combine members that were fitted on rows they predict, and call the score "leaked", instead of refusing them."""
