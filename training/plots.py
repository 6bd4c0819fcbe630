"""The plots that every run folder has."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from contracts.files import atomic_write
from contracts.smape import price_bin, smape_terms


def plot_training_curves(path: Path, metrics: list[dict[str, float]], *, title: str) -> None:
    """Draw each logged quantity over the step, one panel per quantity.

    Quantities that differ only in their prefix share a panel: `train/loss` and `stop/loss` are drawn together.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name in ("step", "epoch"):
                continue
            curves = panels.setdefault(name.split("/")[-1], {})
            curves.setdefault(name, []).append((line["step"], value))
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

    terms = smape_terms(price, predicted)
    by_bin = pd.Series(terms).groupby(price_bin(price), observed=True)
    mean, rows = by_bin.mean(), by_bin.size()
    with figure_at(path, columns=2, width=5.2, height=4) as (figure, (scatter, bars)):
        figure.suptitle(title)
        both = np.concatenate([price, predicted])
        ends = [both.min(), both.max()]
        scatter.scatter(price, predicted, s=5, alpha=0.4, linewidths=0)
        scatter.plot(ends, ends, color="black", linewidth=0.8)
        scatter.set(xscale="log", yscale="log", xlabel="true price, $", ylabel="predicted price, $")
        drawn = bars.bar(mean.index.astype(str), mean)
        bars.bar_label(drawn, [f"n={count}" for count in rows], fontsize=8)
        bars.axhline(terms.mean(), color="black", linewidth=0.8, linestyle="--")
        bars.set(xlabel="true price", ylabel="SMAPE, %")
        bars.tick_params(axis="x", rotation=30)


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
