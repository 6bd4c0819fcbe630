"""What the training runs left behind: learning curves, and the shares of a mixture's experts."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import numpy as np

from contracts.catalog import read_table
from contracts.workspace import Workspace
from pipeline.page import charts
from pipeline.page.markup import legend

PLACES = ("step", "epoch", "seconds")
"""Entries of a line of metrics that say where or how long, not how well."""
FIRST_PANELS = ("smape", "loss")
TITLES = {"smape": "SMAPE, %", "lr": "learning rate"}
LEGEND = {"train": "rows that weights are fitted on", "stop": "rows that decide when to stop"}

Curve = tuple[str, np.ndarray, np.ndarray]
"""part of the data ("train", "stop" or "other"), epochs (n,), values (n,)"""


def learning_curves(workspace: Workspace) -> str:
    """A row of panels for each run; the models of an out-of-fold run share them."""
    folder = workspace.path("run", name="any").parent
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("**/metrics.jsonl")):
        files.setdefault(path.relative_to(folder).parts[0], []).append(path)
    parts = []
    for run, paths in files.items():
        panels: dict[str, list[Curve]] = {}
        for path in paths:
            for quantity, curve in read_curves(path):
                panels.setdefault(quantity, []).append(curve)
        if not panels:
            continue
        models = f" <small>{len(paths)} models</small>" if len(paths) > 1 else ""
        drawn = []
        for quantity in sorted(panels, key=_place):
            drawn.append(f"<div>{charts.curves(TITLES.get(quantity, quantity), panels[quantity])}</div>")
        parts.append(f'<h3>{escape(run)}{models}</h3><div class="panels">{"".join(drawn)}</div>')
    if not parts:
        return ""
    return legend(LEGEND) + "".join(parts)


def _place(quantity: str) -> tuple[int, str]:
    """The error and the loss first, the learning rate last."""
    if quantity in FIRST_PANELS:
        return FIRST_PANELS.index(quantity), ""
    return (9 if quantity == "lr" else 5), quantity


def read_curves(path: Path) -> list[tuple[str, Curve]]:
    """The quantities of a metrics.jsonl over the epochs; one with a single point is no curve and is left out.

    A line that names no epoch is placed by its step, from the steps per epoch of a line that names both.
    """
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    named = [line for line in lines if line.get("epoch")]
    if not named:
        return []
    steps_per_epoch = max(1.0, named[-1]["step"] / named[-1]["epoch"])
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in PLACES and isinstance(value, int | float):
                points.setdefault(name, []).append((line["step"] / steps_per_epoch, value))
    curves = []
    for name, values in points.items():
        if len(values) < 2:
            continue
        part, _, quantity = name.rpartition("/")
        at, height = np.array(values).T
        curves.append((quantity, (part if part in LEGEND else "other", at, height)))
    return curves


def experts(workspace: Workspace) -> str:
    """Which expert of a mixture prices cheap and which expensive products: shares of the gate by price bin."""
    folder = workspace.path("run", name="any").parent
    # an out-of-fold run has a table for each of its models; experts of different models cannot be averaged
    first_of_run: dict[str, Path] = {}
    for path in sorted(folder.glob("**/gate_by_price.csv"), key=lambda file: (len(file.parts), file)):
        first_of_run.setdefault(path.relative_to(folder).parts[0], path)
    panels = []
    for path in first_of_run.values():
        table = read_table(path).set_index("price_bin").astype(float)
        rows = table.pop("rows")
        table.columns = [name.replace("_", " ") for name in table.columns]
        chart = charts.stacked(table.div(table.sum(axis=1), axis=0), rows)
        panels.append(
            f'<div class="panel"><h3>{escape(path.parent.relative_to(folder).as_posix())}</h3>{chart}</div>'
        )
    if not panels:
        return ""
    note = (
        "The mean share in percent that the gate gives to each expert, by true price. Experts that specialise "
        "have different shares for cheap and for expensive products; where all bars look alike, they do not."
    )
    return f'<p class="note">{note}</p><div class="grid">{"".join(panels)}</div>'
