"""Gradient-boosted trees: LightGBM models from several seeds, whose mean is the prediction.

Legend: n rows to fit, m rows to predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from word_models.config import WordModelSettings

if TYPE_CHECKING:
    import lightgbm

TREES: dict[str, Any] = {
    # the absolute error: for small errors SMAPE is about 100·|ln p − ln a|
    "objective": "regression_l1",
    # draw the rows of `subsample` anew for each tree; at 0, the default, LightGBM ignores `subsample`
    "subsample_freq": 1,
    # 0 obeys OMP_NUM_THREADS; the default takes every core, whatever else runs there
    "n_jobs": 0,
    "verbose": -1,
}
"""What all LightGBM models have in common."""
PRICE_TREES = TREES | {
    "learning_rate": 0.03,
    "num_leaves": 31,
    "min_child_samples": 20,
    "colsample_bytree": 0.3,
    "subsample": 0.8,
    "reg_lambda": 1.0,
}
CORRECTION_TREES = TREES | {
    "learning_rate": 0.02,
    "num_leaves": 12,
    "min_child_samples": 40,
    "colsample_bytree": 0.2,
    "subsample": 0.7,
    "reg_lambda": 5.0,
}
"""Smaller and more strongly regularised than PRICE_TREES: most of the error that the kernel leaves is noise."""


@dataclass
class TreeEnsemble:
    boosters: list[lightgbm.Booster]
    """one per seed"""

    @classmethod
    def fit(
        cls, settings: WordModelSettings, columns: np.ndarray, target: np.ndarray, options: dict[str, Any]
    ) -> TreeEnsemble:
        """One LightGBM model per seed, fitted on columns (n, ·) and target (n,)."""
        import lightgbm

        boosters = []
        for seed in range(settings.seed, settings.seed + settings.seeds):
            model = lightgbm.LGBMRegressor(n_estimators=settings.trees, random_state=seed, **options)
            boosters.append(model.fit(columns, target).booster_)
        return cls(boosters)

    def predict(self, columns: np.ndarray) -> np.ndarray:
        """(m, ·) → (m,)"""
        return np.mean([booster.predict(columns, num_threads=0) for booster in self.boosters], axis=0)

    def save(self, folder: Path) -> None:
        """Write trees_0.txt, trees_1.txt, …, one per seed, in LightGBM's own format."""
        for number, booster in enumerate(self.boosters):
            booster.save_model(folder / f"trees_{number}.txt")

    @classmethod
    def load(cls, folder: Path) -> TreeEnsemble:
        import lightgbm

        # in their order, so that the mean is the same to the last digit
        files = sorted(folder.glob("trees_*.txt"), key=lambda file: int(file.stem.removeprefix("trees_")))
        return cls([lightgbm.Booster(model_file=file) for file in files])
