"""The plots that every run folder has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from contracts.files import atomic_write
from contracts.smape import price_bin, smape_terms

if TYPE_CHECKING:
    import pandas as pd

FEW_POINTS = 30
"""Below this many points a curve shows each of them."""
FOOT = 0.08
"""Height of a number at the foot of a bar, as a share of the highest bar."""
PANELS_PER_ROW = 3
"""More would be too small to read at the width of a page."""


def plot_training_curves(path: Path, metrics: list[dict[str, float]], *, title: str) -> None:
    """Draw each logged quantity over the epochs, one panel per quantity.

    Quantities that differ only in their prefix share a panel: `train/loss` and `stop/loss` are drawn together. A line
    that names no epoch is placed by its step, from the steps per epoch of a line that names both; where no line names
    an epoch, steps are drawn as they are.
    """
    steps_per_epoch = _steps_per_epoch(metrics)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name in ("step", "epoch", "seconds"):
                continue
            curves = panels.setdefault(name.split("/")[-1], {})
            curves.setdefault(name, []).append((line["step"] / steps_per_epoch, value))
    columns = min(PANELS_PER_ROW, max(1, len(panels)))
    rows = -(-len(panels) // columns) or 1
    with figure_at(path, columns=columns, rows=rows, width=4.2, height=3.4) as (figure, axes):
        figure.suptitle(title)
        for axis, (quantity, curves) in zip(axes, panels.items(), strict=False):
            for name, points in curves.items():
                at, values = zip(*points, strict=True)
                axis.plot(at, values, label=name, marker="." if len(points) < FEW_POINTS else None)
            axis.set(
                xlabel="step" if steps_per_epoch == 1 and not _names_epochs(metrics) else "epoch",
                title=quantity,
            )
            axis.legend(frameon=False)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)


def _names_epochs(metrics: list[dict[str, float]]) -> bool:
    return any("epoch" in line for line in metrics)


def _steps_per_epoch(metrics: list[dict[str, float]]) -> float:
    """Steps in one epoch, from the last line that names an epoch; 1 where none does."""
    for line in reversed(metrics):
        if line.get("epoch"):
            return max(1.0, line["step"] / line["epoch"])
    return 1.0


def plot_error_by_price(path: Path, price: np.ndarray, predicted: np.ndarray, *, title: str) -> None:
    """Predicted over true price, and the SMAPE of each price bin with its standard error and number of rows."""
    import pandas as pd

    terms = smape_terms(price, predicted)
    by_bin = pd.Series(terms).groupby(price_bin(price), observed=True)
    with figure_at(path, columns=2, width=5.2, height=4) as (figure, (scatter, bars)):
        figure.suptitle(title)
        both = np.concatenate([price, predicted])
        ends = [both.min(), both.max()]
        scatter.scatter(price, predicted, s=5, alpha=0.4, linewidths=0)
        scatter.plot(ends, ends, color="black", linewidth=0.8)
        scatter.set(xscale="log", yscale="log", xlabel="true price", ylabel="predicted price")
        for axis in (scatter.xaxis, scatter.yaxis):
            label_prices(axis, low=ends[0], high=ends[1])
        draw_error_bars(bars, by_bin.mean(), by_bin.sem(), by_bin.size(), overall=terms.mean())
        bars.set(xlabel="true price")


def label_prices(axis, *, low: float, high: float) -> None:
    """Write $10 instead of 10¹ along a log axis; over less than two powers of ten, also $20 and $50."""
    from matplotlib.ticker import LogLocator, NullLocator

    steps = (1, 2, 5) if high < 100 * low else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda dollars, _: f"${dollars:,.10g}")


def draw_error_bars(axis, smape: pd.Series, error: pd.Series, rows: pd.Series, *, overall: float) -> None:
    """A bar per group with its standard error (none for a single row), its number of rows, and a line for all rows.

    Args:
        smape, error, rows: by group; the index labels the bars.
        overall: SMAPE of all rows.
    """
    # a bin of one row has no standard error, and no bar for it
    drawn = axis.bar(
        smape.index.astype(str), smape, yerr=error.fillna(0), capsize=3, error_kw={"linewidth": 0.8}
    )
    axis.axhline(overall, color="black", linewidth=0.8, linestyle="--", label=f"all rows: {overall:.1f}")
    # at the foot of a bar, where neither the line nor the error bar strikes the number through; else above the bar
    error = error.fillna(0)
    needed = FOOT * max((smape + error).max(), overall)
    for bar, count, value, spread in zip(drawn, rows, smape, error, strict=True):
        fits = min(value - spread, overall) > needed
        above = value + spread
        if above <= overall < above + needed:
            above = overall
        axis.annotate(
            f"n={count}",
            (bar.get_x() + bar.get_width() / 2, 0 if fits else above),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="white" if fits else "black",
        )
    axis.set(ylabel="SMAPE, %")
    axis.margins(y=0.15)  # room for the legend
    axis.tick_params(axis="x", rotation=30)
    axis.legend(frameon=False, fontsize=8)


class figure_at:
    """Axes, row by row, that are saved to `path` when the block ends; each is `width` by `height` inches."""

    def __init__(self, path: Path, *, columns: int, rows: int = 1, width: float, height: float):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Figure and canvas without pyplot: no global state, no display
        self.path, self.figure = path, Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.subplots(rows, columns, squeeze=False).flatten()

    def __enter__(self):
        return self.figure, self.axes

    def __exit__(self, kind, *_):
        if kind is None:
            with atomic_write(self.path, "wb") as file:
                self.figure.savefig(file, dpi=110, format="png")
