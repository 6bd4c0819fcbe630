"""Where the prices are right and where they are wrong: errors by group, predicted against true, intervals."""

from __future__ import annotations

from html import escape

import numpy as np
import pandas as pd

from contracts.catalog import ColumnMapping
from contracts.files import read_json
from contracts.workspace import Workspace
from pipeline.page import charts
from pipeline.page.held_out import HeldOut, by_group, groupings, price_groups
from pipeline.page.markup import data_table, percent, ratio_words


def errors(workspace: Workspace, held_out: HeldOut | None) -> str:
    """SMAPE by price, unit kind, every category column, and whether there is a picture."""
    if held_out is None:
        return ""
    features = ColumnMapping.from_json(read_json(workspace.path("catalog"))).features
    overall = held_out.rows["smape"].mean()
    panels = []
    for name, groups in groupings(held_out, features).items():
        chart = charts.bars(by_group(held_out.rows["smape"], groups), reference=overall, heading="SMAPE, %")
        panels.append(f'<div class="panel"><h3>By {escape(name)}</h3>{chart}</div>')
    note = (
        f"SMAPE of <b>{escape(held_out.run)}</b> in percent, with its standard error over n products. The dashed line "
        f"is the error over all of them, {overall:.1f}. A single product has no standard error."
    )
    return f'<p class="note">{note}</p><div class="grid">{"".join(panels)}</div>'


def predicted_and_true(held_out: HeldOut | None) -> str:
    if held_out is None:
        return ""
    price = held_out.rows["price"].to_numpy()
    predicted = held_out.rows["predicted"].to_numpy()
    ratio = np.abs(np.log(predicted / price))
    within = []
    for factor in (1.25, 1.5, 2):
        within.append(f"{percent((ratio <= np.log(factor)).mean())} are within a factor of {factor:g}")
    drawn = "Each dot is a product"
    if len(price) > charts.POINTS:
        drawn = f"Each dot is one of {charts.POINTS:,} products, drawn at random from {len(price):,}"
    groups = price_groups(price, held_out.currency)
    ln_ratio = pd.Series(np.log(predicted / price))
    typical = np.exp(ln_ratio.groupby(groups, observed=True).median())
    lines = [("", [escape(str(label)), ratio_words(factor)]) for label, factor in typical.items()]
    return (
        f'<div class="side"><div>{charts.scatter(price, predicted, held_out.currency)}</div><div>'
        f"<p>{drawn}. On the solid line the price is right; at the dashed lines it is half or twice the true one.</p>"
        f"<p>Of the prices, {', '.join(within)}.</p>"
        f"<h3>Typical lean</h3>{data_table(['true price', 'median prediction'], lines, stack=False)}"
        '<p class="note">A model that is not sure prices towards the middle: cheap products too high, expensive ones '
        "too low.</p></div></div>"
    )


def coverage(held_out: HeldOut | None) -> str:
    """How often the intervals hold the true price, by price."""
    if held_out is None or not held_out.intervals:
        return ""
    groups = price_groups(held_out.rows["price"].to_numpy(), held_out.currency)
    panels = []
    for level, interval in held_out.intervals.items():
        table = by_group(100.0 * interval["inside"], groups)
        chart = charts.bars(table, reference=100 * level, top=100.0, heading="share inside, %")
        width = np.sqrt(interval["high"] / interval["low"]).median()
        caption = f"Typical width: from the price divided by {width:.2g} to the price times {width:.2g}."
        panels.append(
            f'<div class="panel"><h3>{percent(level)} interval</h3>{chart}<p class="note">{caption}</p></div>'
        )
    note = (
        "Percent of the true prices that lie in their interval, by true price. The dashed line is the promise. The "
        "intervals of each hold-out are calibrated on the other hold-outs, so no price takes part in its own interval."
    )
    return f'<p class="note">{note}</p><div class="grid">{"".join(panels)}</div>'
