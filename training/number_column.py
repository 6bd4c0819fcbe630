"""A number of the table as two columns of a model's input: the word models and the fusion read it alike.

Legend: N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class NumberColumn:
    """How one number is standardised, learnt from the rows to fit."""

    low: float
    high: float
    """their range; a number beyond it counts as the end of the range"""
    logarithm: bool
    """whether ln is taken first: where every number is above 0, it is ratios that matter, as for prices"""
    mean: float
    deviation: float
    """after the logarithm; 1 where all numbers are the same"""

    @classmethod
    def fit(cls, values: np.ndarray) -> NumberColumn:
        """From the values (N,) of the rows to fit, NaN where none is stated."""
        stated = values[np.isfinite(values)]
        if len(stated) == 0:
            return cls(low=0.0, high=0.0, logarithm=False, mean=0.0, deviation=1.0)
        low = float(stated.min())
        high = float(stated.max())
        logarithm = low > 0
        scaled = np.log(stated) if logarithm else stated
        # the deviation of equal numbers is not exactly 0 in floating point
        deviation = float(scaled.std()) if high > low else 1.0
        return cls(low, high, logarithm, float(scaled.mean()), deviation)

    def columns(self, values: np.ndarray) -> np.ndarray:
        """(N,) → (N, 2): the standardised number, 0 where none is stated, and 1 where none is stated."""
        missing = ~np.isfinite(values)
        clipped = np.clip(np.where(missing, self.low, values), self.low, self.high)
        scaled = np.log(clipped) if self.logarithm else clipped
        standardised = (scaled - self.mean) / self.deviation
        return np.column_stack([np.where(missing, 0.0, standardised), missing])
