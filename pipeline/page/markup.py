"""The smallest pieces of the report: numbers in words, tables, legends. What comes in is text, what goes out is html.

`money`, `percent`, `ratio_words` and `beginning` give text, which the caller escapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np


def money(price: float, currency: str, *, whole: bool = False) -> str:
    """A price with its currency: $4.89, $1,312, EUR 4.89. `whole`: without cents where there are none."""
    if not np.isfinite(price):
        return "no limit"
    space = " " if currency[-1:].isalpha() else ""
    cents = 0 if price >= 1000 or (whole and float(price).is_integer()) else 2
    return f"{currency}{space}{price:,.{cents}f}"


def percent(share: float, digits: int = 0) -> str:
    """0.8 is "80 %", with a space that no line breaks at."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def ratio_words(ratio: float) -> str:
    """1.2 is "20 % too high"."""
    if abs(ratio - 1) < 0.005:
        return "right"
    return f"{percent(abs(ratio - 1))} too {'high' if ratio > 1 else 'low'}"


def beginning(text: str, length: int) -> str:
    """The beginning of a text in one line, whole words; a dot stands where a line ended."""
    lines = [" ".join(line.split()) for line in text[: 2 * length].splitlines()]
    line = " · ".join(line for line in lines if line)
    if len(line) <= length:
        return line
    return line[:length].rsplit(" ", 1)[0] + " …"


def breakable(name: str) -> str:
    """A long_name_of_a_model that may break after each underscore."""
    return escape(name).replace("_", "_<wbr>")


def data_table(headings: Sequence[str], lines: Sequence[tuple[str, list[str]]], *, stack: bool = True) -> str:
    """A table; with `stack` it becomes a list of cards on a narrow screen.

    Args:
        headings: text.
        lines: class of the row, and its cells as html.
    """
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = []
    for kind, cells in lines:
        first = f'<th scope="row">{cells[0]}</th>'
        # the label stands before the cell where the columns are stacked
        others = [
            f'<td data-label="{escape(heading)}">{f"<span>{cell}</span>" if cell else ""}</td>'
            for heading, cell in zip(headings[1:], cells[1:], strict=True)
        ]
        body.append(f'<tr class="{kind}">{first}{"".join(others)}</tr>')
    style = "data stack" if stack else "data"
    return f'<table class="{style}"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def legend(meanings: dict[str, str]) -> str:
    """What the marks of a chart mean, by their class in page.css."""
    keys = [
        f'<li><i class="key {escape(mark)}"></i>{escape(meaning)}</li>' for mark, meaning in meanings.items()
    ]
    return f'<ul class="legend">{"".join(keys)}</ul>'
