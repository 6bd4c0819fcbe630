"""A fitted ensemble as it is kept: `checkpoints/<run>/model.json`, and how it prices rows that its members have priced.

Legend: N rows, J members.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from contracts.errors import InputError
from contracts.files import read_versioned, write_json
from ensemble.weights import difficulty_of

SCHEMA = 1
FILE = "model.json"


@dataclass(frozen=True)
class Member:
    """A model of the ensemble: the name of its prediction files, the stage that made it, and its run folder."""

    name: str
    stage: str
    run: str


@dataclass(frozen=True)
class Ensemble:
    """Weights and intervals, fitted on the prices of all training rows that every member priced unseen."""

    members: tuple[Member, ...]
    weights: tuple[float, ...]
    """J, not negative, sum 1"""
    interval_factors: dict[float, float]
    """for each coverage, the half-width of the interval in ln price per unit of difficulty"""
    score: dict[str, Any]
    """SMAPE of the ensemble on rows that neither members nor weights have seen, its standard error, coverage"""

    @property
    def expected_error(self) -> str:
        """The honest score in words; empty where the members have seen the rows that they were scored on."""
        if "smape" not in self.score:
            return ""
        error = self.score["standard_error"]
        return f"expect a SMAPE of {self.score['smape']:.2f} ± {error:.2f}, as on {self.score['rows']} unseen rows"

    def ln_price(self, ln_predicted: np.ndarray) -> np.ndarray:
        """(N, J) ln prices of the members to (N,) of the ensemble."""
        return ln_predicted @ np.array(self.weights)

    def prices(self, sample_ids: np.ndarray, ln_predicted: np.ndarray) -> pd.DataFrame:
        """Columns sample_id, price, and low_<percent>, high_<percent> of each coverage, in dollars.

        Args:
            sample_ids: (N,) str.
            ln_predicted: (N, J) ln prices of the members.
        """
        ln_price = self.ln_price(ln_predicted)
        difficulty = difficulty_of(ln_predicted)
        table = pd.DataFrame({"sample_id": sample_ids, "price": np.exp(ln_price).round(4)})
        for coverage, factor in self.interval_factors.items():
            table[f"low_{coverage:.0%}"] = np.exp(ln_price - factor * difficulty).round(4)
            table[f"high_{coverage:.0%}"] = np.exp(ln_price + factor * difficulty).round(4)
        return table

    def save(self, folder: Path) -> None:
        content = asdict(self) | {"schema": SCHEMA}
        # json has no numbers as keys
        content["interval_factors"] = {
            str(coverage): factor for coverage, factor in self.interval_factors.items()
        }
        write_json(folder / FILE, content)

    @classmethod
    def load(cls, folder: Path) -> Ensemble:
        """Raises InputError: no ensemble in this folder, or one of another version."""
        path = folder / FILE
        if not path.is_file():
            raise InputError(f"{path}: no fitted ensemble; run python -m ensemble.train")
        content = read_versioned(path, SCHEMA, "train it again")
        factors = {float(coverage): factor for coverage, factor in content["interval_factors"].items()}
        members = tuple(Member(**member) for member in content["members"])
        return cls(members, tuple(content["weights"]), factors, content["score"])
