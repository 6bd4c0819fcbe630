"""The plots that every run folder has."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from contracts.files import atomic_write
from contracts.smape import price_bin, smape_terms


def plot_training_curves(path: Path, metrics: list[dict[str, float]], *, title: str) -> None:
    """One panel a logged quantity over the step; quantities that differ only in their prefix share a panel.

    `train/loss` and `stop/loss` are drawn together, `lr` alone.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name not in ("step", "epoch"):
                panels.setdefault(name.split("/")[-1], {}).setdefault(name, []).append((line["step"], value))
    with figure_at(path, columns=max(1, len(panels)), width=4.2, height=3.4) as (figure, axes):
        figure.suptitle(title)
        for axis, (quantity, curves) in zip(axes, panels.items(), strict=False):
            for name, points in curves.items():
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, label=name, marker="." if len(points) < 30 else None)
            axis.set(xlabel="step", title=quantity)
            axis.legend(frameon=False)


def plot_error_by_price(path: Path, price: np.ndarray, predicted: np.ndarray, *, title: str) -> None:
    """Predicted over true price, and the SMAPE of each price bin with its number of rows."""
    import pandas as pd

    terms = pd.Series(smape_terms(price, predicted)).groupby(price_bin(price), observed=True)
    with figure_at(path, columns=2, width=5.2, height=4) as (figure, axes):
        figure.suptitle(title)
        low, high = min(price.min(), predicted.min()), max(price.max(), predicted.max())
        axes[0].scatter(price, predicted, s=5, alpha=0.4, linewidths=0)
        axes[0].plot([low, high], [low, high], color="black", linewidth=0.8)
        axes[0].set(xscale="log", yscale="log", xlabel="true price, $", ylabel="predicted price, $")
        mean, size = terms.mean(), terms.size()
        bars = axes[1].bar(mean.index.astype(str), mean)
        axes[1].bar_label(bars, [f"n={rows}" for rows in size], fontsize=8)
        axes[1].axhline(smape_terms(price, predicted).mean(), color="black", linewidth=0.8, linestyle="--")
        axes[1].set(xlabel="true price", ylabel="SMAPE, %")
        axes[1].tick_params(axis="x", rotation=30)


class figure_at:
    """A row of axes that is saved to `path` when the block ends."""

    def __init__(self, path: Path, *, columns: int, width: float, height: float):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Figure and canvas without pyplot: no global state, no display
        self.path, self.figure = path, Figure(figsize=(width * columns, height), layout="constrained")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.subplots(1, columns, squeeze=False)[0]

    def __enter__(self):
        return self.figure, self.axes

    def __exit__(self, kind, *_):
        if kind is None:
            with atomic_write(self.path, "wb") as file:
                self.figure.savefig(file, dpi=110, format="png")
