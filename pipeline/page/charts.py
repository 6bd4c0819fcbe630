"""Charts of the report, as pieces of html that take their colours from page.css and need no script.

Bars are rows of a table, so that their text keeps its size on a telephone. Points and curves are svg, drawn in a frame
about as wide as a telephone, so that their text is legible there too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd

from pipeline.page.markup import legend, money

COLUMNS = '<col class="label"><col><col class="value">'
"""of a table of bars: the bars get what the texts leave"""
NARROW_TRACK = 134
"""Pixels of the narrowest place for a bar, on a screen of 360 pixels."""
DIGIT = 6.5
"""Pixels of one character in a bar."""
POINTS = 2000
"""Products drawn in the scatter plot at most: more would only weigh."""
CURVE_POINTS = 120
"""Points of one curve at most; neighbouring ones are averaged."""
FEW_CURVES = 3
"""More curves in one panel are drawn thin."""


def bars(table: pd.DataFrame, *, reference: float, top: float | None = None, heading: str) -> str:
    """A bar per group with its standard error and number of rows, and a dashed line at `reference`.

    Args:
        table: indexed by label; columns value, error (NaN for a single row), rows.
        top: value at the right end; by default the end of the longest bar or whisker.
        heading: column heading of the values.
    """
    error = table["error"].fillna(0.0)
    if top is None:
        top = max(float((table["value"] + error).max()), reference) or 1.0
    lines = []
    for label, row in table.iterrows():
        spread = 0.0 if math.isnan(row["error"]) else row["error"]
        length = row["value"] / top
        # the whisker ends where the bars can end: a share inside an interval is between 0 and 100 %
        start = max(row["value"] - spread, 0.0) / top
        end = min((row["value"] + spread) / top, 1.0)
        count = f"n={row['rows']:,.0f}"
        # in the bar only where neither the whisker nor the bar's end cuts it
        inside = start * NARROW_TRACK > DIGIT * len(count) + 8
        whisker = ""
        if spread:
            whisker = f'<i class="whisker" style="left:{start:.1%};width:{end - start:.1%}"></i>'
        lines.append(
            f'<tr><th scope="row">{escape(str(label))}{"" if inside else f" <small>{count}</small>"}</th>'
            f'<td class="track" style="--at:{reference / top:.1%}">'
            f'<div class="bar" style="width:{length:.1%}">{f"<span>{count}</span>" if inside else ""}</div>'
            f"{whisker}</td>"
            f'<td class="value">{row["value"]:.1f}{f" <small>± {spread:.1f}</small>" if spread else ""}</td></tr>'
        )
    return (
        f'<table class="bars" aria-label="{escape(heading)}">{COLUMNS}<tbody>{"".join(lines)}</tbody></table>'
    )


def stacked(shares: pd.DataFrame, rows: pd.Series) -> str:
    """A bar per group that is divided by `shares` (groups × parts, each row sums to 1), and a legend of the parts."""
    meanings = {f"part p{part % 8}": str(name) for part, name in enumerate(shares.columns)}
    lines = []
    for label, values in shares.iterrows():
        parts = []
        for part, (name, share) in enumerate(values.items()):
            # a part that is too narrow for its number still has it as a tooltip
            written = f"{100 * share:.0f}" if share * NARROW_TRACK > 3 * DIGIT else ""
            tip = escape(f"{name}: {100 * share:.1f} %")
            parts.append(
                f'<div class="part p{part % 8}" style="width:{share:.2%}" title="{tip}">{written}</div>'
            )
        lines.append(
            f'<tr><th scope="row">{escape(str(label))}</th><td><div class="divided">{"".join(parts)}</div></td>'
            f'<td class="value"><small>n={rows[label]:,.0f}</small></td></tr>'
        )
    return f'{legend(meanings)}<table class="bars">{COLUMNS}<tbody>{"".join(lines)}</tbody></table>'


def scatter(price: np.ndarray, predicted: np.ndarray, currency: str) -> str:
    """Predicted over true price, both on a log scale, with the diagonal and lines at half and twice the price."""
    left, top = 52.0, 8.0
    width = height = 288.0
    both = np.concatenate([price, predicted])
    low = np.log(both.min()) - 0.05
    high = np.log(both.max()) + 0.05

    def place(value: np.ndarray | float) -> np.ndarray:
        """0 to 1 along either axis"""
        return (np.log(value) - low) / (high - low)

    shown = np.arange(len(price))
    if len(price) > POINTS:
        shown = np.sort(np.random.default_rng(0).permutation(len(price))[:POINTS])
    x = left + width * place(price[shown])
    y = top + height * (1 - place(predicted[shown]))
    points = "".join(
        f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2"/>' for across, down in zip(x, y, strict=True)
    )

    grid = []
    for tick in price_ticks(math.exp(low), math.exp(high)):
        across = left + width * float(place(tick))
        down = top + height * (1 - float(place(tick)))
        label = escape(tick_label(tick, currency))
        grid.append(f'<path class="grid" d="M{across:.1f} {top}v{height}M{left} {down:.1f}h{width}"/>')
        grid.append(f'<text x="{across:.1f}" y="{top + height + 15}" text-anchor="middle">{label}</text>')
        grid.append(f'<text x="{left - 6}" y="{down + 4:.1f}" text-anchor="end">{label}</text>')

    guides = []
    for factor, name in ((1.0, "diagonal"), (0.5, "guide"), (2.0, "guide")):
        shift = -math.log(factor) / (high - low) * height
        guides.append(
            f'<path class="{name}" d="M{left} {top + height + shift:.1f}L{left + width} {top + shift:.1f}"/>'
        )
    frame = f'<clipPath id="frame"><path d="M{left} {top}h{width}v{height}h-{width}z"/></clipPath>'
    return (
        f'<svg class="chart scatter" viewBox="0 0 360 334" role="img" aria-label="Predicted price over true price">'
        f'{frame}{"".join(grid)}<g clip-path="url(#frame)"><g class="points">{points}</g>{"".join(guides)}</g>'
        f'<text x="{left + width / 2}" y="331" text-anchor="middle">true price</text>'
        f'<text transform="translate(10 {top + height / 2}) rotate(-90)" text-anchor="middle">predicted price</text>'
        "</svg>"
    )


def curves(title: str, lines: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> str:
    """Curves over the epochs in one panel.

    Args:
        lines: name (which part of the data: its class in page.css), epochs (n,), values (n,) of each curve.
    """
    left, top = 44.0, 24.0
    width, height = 246.0, 130.0
    epochs = np.concatenate([at for _, at, _ in lines])
    values = np.concatenate([value for _, _, value in lines])
    first = float(epochs.min())
    last = float(epochs.max())
    ticks = linear_ticks(float(values.min()), float(values.max()))
    low = min(float(values.min()), ticks[0])
    high = max(float(values.max()), ticks[-1])

    def across(epoch: float) -> float:
        return left + width * (epoch - first) / ((last - first) or 1.0)

    def down(value: float) -> float:
        return top + height * (1 - (value - low) / ((high - low) or 1.0))

    parts = [f'<text class="title" x="0" y="13">{escape(title)}</text>']
    for tick in ticks:
        y = down(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{width}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in whole_ticks(first, last):
        parts.append(
            f'<text x="{across(tick):.1f}" y="{top + height + 16}" text-anchor="middle">{tick}</text>'
        )
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 32}" text-anchor="middle">epoch</text>')
    for name, at, value in lines:
        at, value = thinned(at, value)
        steps = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(at, value, strict=True))
        parts.append(f'<polyline class="curve {escape(name)}" points="{steps}"/>')
    style = "chart many" if len(lines) > FEW_CURVES else "chart"
    return f'<svg class="{style}" viewBox="0 0 300 190" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def thinned(at: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most CURVE_POINTS points: means over neighbouring ones."""
    if len(at) <= CURVE_POINTS:
        return at, value
    pieces = np.array_split(np.arange(len(at)), CURVE_POINTS)
    mean_at = [at[piece].mean() for piece in pieces]
    mean_value = [value[piece].mean() for piece in pieces]
    return np.array(mean_at), np.array(mean_value)


def price_strip(
    marks: dict[str, float], bands: Sequence[tuple[float, float]], members: Sequence[float]
) -> str:
    """One product on a log scale: its intervals (widest first), the members' prices, the predicted and the true price.

    Args:
        marks: "price" and "predicted".
        bands: low and high of each interval; an endless one ends at the frame.
    """
    ends = [value for band in bands for value in band if 0 < value < math.inf]
    known = [*marks.values(), *members, *ends]
    low = math.log(min(known))
    high = math.log(max(known))
    margin = 0.06 * (high - low) or 1.0

    def place(value: float) -> float:
        """0 to 300; prices without limit lie at the ends"""
        if value <= 0:
            return 0.0
        if value == math.inf:
            return 300.0
        return 300 * (math.log(value) - low + margin) / (high - low + 2 * margin)

    parts = []
    for number, (start, end) in enumerate(bands):
        x = place(start)
        parts.append(
            f'<rect class="band b{number}" x="{x:.1f}" y="7" width="{place(end) - x:.1f}" height="14" rx="3"/>'
        )
    for price in members:
        parts.append(f'<path class="member" d="M{place(price):.1f} 9v10"/>')
    parts.append(f'<circle class="predicted" cx="{place(marks["predicted"]):.1f}" cy="14" r="5"/>')
    parts.append(f'<path class="true" d="M{place(marks["price"]):.1f} 1h5l-5 11l-5 -11z"/>')
    return f'<svg class="strip" viewBox="0 0 300 26" aria-hidden="true">{"".join(parts)}</svg>'


# Ticks


def price_ticks(low: float, high: float) -> list[float]:
    """Round prices between two, at most seven: 1, 2, 5, 10, … or, over many powers of ten, 1, 10, 100, …"""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [
            step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high
        ]
        if len(found) <= 7:
            break
    return found


def tick_label(price: float, currency: str) -> str:
    """$0.50, $1, $500, $2k, $1M: short enough for the margin of a chart."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if price >= size:
            return f"{money(1, currency, whole=True)[:-1]}{price / size:g}{letter}"
    return money(price, currency, whole=True)


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten that lie between two values."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        count = math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) + 1
        if count <= most:
            break
    start = math.ceil(low / step - 1e-9)
    return [(start + number) * step for number in range(count)]


def whole_ticks(low: float, high: float) -> list[int]:
    """Whole epochs."""
    return sorted({round(tick) for tick in linear_ticks(low, high) if float(tick).is_integer()})
