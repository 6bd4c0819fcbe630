"""The products whose price is furthest off, with their pictures and what the model knew of them."""

from __future__ import annotations

import base64
import io
import re
from html import escape

import numpy as np
import pandas as pd

from contracts.catalog import FEATURE
from contracts.workspace import Workspace
from pipeline.page.charts import price_strip
from pipeline.page.held_out import HeldOut
from pipeline.page.markup import beginning, breakable, legend, money, percent, ratio_words
from training.pictures import UnreadablePicture, open_picture

WORST = 20
THUMBNAIL = 192
"""Pixels of a product picture's longer side; it is shown at half that size, sharp on a fine screen too."""
LONGEST_NAME = 110
"""Characters of a product's name that are shown."""
LONGEST_TEXT = 220
"""Characters of a product's text that are shown."""
ITEM_NAME_LINE = re.compile(r"\AItem Name:[^\n]*\n?")


def furthest_off(workspace: Workspace, held_out: HeldOut | None) -> str:
    """The WORST products with their pictures, and what the model knew of each."""
    if held_out is None:
        return ""
    worst = held_out.rows.sort_values("smape", ascending=False, kind="stable").index[:WORST]
    cards = [_product(workspace, held_out, sample_id) for sample_id in worst]
    key_to_marks = ""
    if held_out.members.shape[1]:
        keys = {"true": "true price", "predicted": "predicted", "member": "each member"}
        if held_out.intervals:
            keys["band"] = "80 and 95 % interval"
        key_to_marks = legend(keys)
    pictures = ""
    if not held_out.reads_pictures and (held_out.rows["picture_problem"] == "").any():
        pictures = " The models of this workspace read no pictures; they are shown for you."
    note = (
        f"The {len(worst)} unseen products with the largest error, and what the model knew of them.{pictures}"
    )
    # without a single picture, the empty frames would only take space
    layout = "cards" if any("<img" in card for card in cards) else "cards bare"
    return f'<p class="note">{note}</p>{key_to_marks}<div class="{layout}">{"".join(cards)}</div>'


def _product(workspace: Workspace, held_out: HeldOut, sample_id: str) -> str:
    row = held_out.rows.loc[sample_id]
    currency = held_out.currency
    members = held_out.members.loc[sample_id]
    intervals = {level: interval.loc[sample_id] for level, interval in held_out.intervals.items()}
    widest_first = sorted(intervals, reverse=True)
    strip = ""
    if len(members):  # two marks alone would say no more than the two numbers above
        strip = price_strip(
            {"price": row["price"], "predicted": row["predicted"]},
            [(intervals[level]["low"], intervals[level]["high"]) for level in widest_first],
            members.tolist(),
        )
    text = beginning(ITEM_NAME_LINE.sub("", row["catalog_content"]), LONGEST_TEXT)
    facts = {"amount": _amount(row)}
    for column in row.index[row.index.str.startswith(FEATURE)]:
        facts[column.removeprefix(FEATURE)] = _stated(row[column])
    facts["missing"] = ", ".join(_missing(row, held_out))
    for level, interval in intervals.items():
        bounds = f"{money(interval['low'], currency)} to {money(interval['high'], currency)}"
        facts[f"{percent(level)} interval"] = bounds
    for name, price in members.items():
        facts[str(name)] = money(price, currency)
    written = [f"<dt>{breakable(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items() if fact]
    name = beginning(row["entity_name"], LONGEST_NAME) or f"product {sample_id}"
    return (
        f'<article class="product"><div class="picture">{_picture(workspace, row)}</div><div class="head">'
        f'<h3>{escape(name)}</h3><p class="verdict"><b>{escape(money(row["price"], currency))}</b> true, '
        f"<b>{escape(money(row['predicted'], currency))}</b> predicted: {_how_wrong(row)}"
        f" <small>SMAPE {row['smape']:.0f}, id {escape(sample_id)}</small></p>"
        f'</div><div class="known">{strip}{f"<p>{escape(text)}</p>" if text else ""}'
        f"<dl>{''.join(written)}</dl></div></article>"
    )


def _how_wrong(row: pd.Series) -> str:
    ratio = row["predicted"] / row["price"]
    factor = max(ratio, 1 / ratio)
    if factor < 2:
        return ratio_words(ratio)
    written = f"{factor:,.0f}" if factor >= 10 else f"{factor:.1f}"
    return f"{written} times too {'high' if ratio > 1 else 'low'}"


def _amount(row: pd.Series) -> str:
    if pd.isna(row["amount"]) or row["unit_kind"] == "none":
        return ""
    pack = f", pack of {row['pack_count']:g}" if row["pack_count"] > 1 else ""
    amount = f"{row['amount']:,.0f}" if row["amount"] >= 1000 else f"{row['amount']:.4g}"
    return f"{amount} {str(row['unit']).replace('_', ' ')}{pack}"


def _missing(row: pd.Series, held_out: HeldOut) -> list[str]:
    """What a model could have used and this product lacks."""
    missing = []
    if not row["catalog_content"].strip():
        missing.append("text")
    if held_out.reads_pictures and row["picture_problem"]:
        missing.append(f"picture ({row['picture_problem']})")
    if held_out.states_amounts and not _amount(row):
        missing.append("amount")
    for column in row.index[row.index.str.startswith(FEATURE)]:
        if not _stated(row[column]):
            missing.append(column.removeprefix(FEATURE))
    return missing


def _stated(value: object) -> str:
    """A further fact as it is shown, "" where the product has none."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:g}"
    return str(value).strip()


def _picture(workspace: Workspace, row: pd.Series) -> str:
    """The picture as a small JPEG inside the page, or the reason why it cannot be shown."""
    if not row["image"]:
        return "<span>no picture</span>"
    try:
        image = open_picture(workspace.images_folder() / row["image"], min_side=THUMBNAIL)
    except UnreadablePicture as reason:
        return f"<span>picture: {escape(str(reason))}</span>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=72)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
