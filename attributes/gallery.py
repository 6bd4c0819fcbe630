"""One page of listings to look at: picture, answers, confidence, chains."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from attributes.data import Listing
from attributes.shards import Answered
from contracts.files import atomic_write
from training.pictures import UnreadablePicture, open_picture

THUMBNAIL = 160
STYLE = """body{font:15px system-ui;margin:2rem auto;max-width:70rem;padding:0 1rem}
article{display:flex;gap:1rem;border-top:1px solid #ccc;padding:1rem 0}
img{max-width:160px;height:auto}td{padding:.1rem .8rem .1rem 0;vertical-align:top}
.withheld{color:#767676}pre{white-space:pre-wrap;margin:.2rem 0}"""


def thumbnail(images: Path | None, name: str) -> str:
    """An <img> with the picture inside, or the reason why there is none."""
    try:
        if images is None:
            raise UnreadablePicture("missing")
        picture = open_picture(images / name, min_side=THUMBNAIL)
    except UnreadablePicture as error:
        return f"<p>{html.escape(name)}: {html.escape(str(error))}</p>"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=80)
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{encoded}">'


def write_gallery(
    path: Path, answered: Sequence[Answered], described: pd.DataFrame, images: Path | None, *, listings: int
) -> None:
    """Write the page for the first listings of a table.

    Args:
        described: of `extract_attributes.describe`, in the order of `answered`.
    """
    by_listing: dict[Listing, list[str]] = {}
    for each, line in zip(answered, described.to_dict("records"), strict=True):
        rows = by_listing.setdefault(each.question.listing, [])
        if len(by_listing) <= listings:
            rows.append(_row(each, line))
    parts = []
    for listing, rows in list(by_listing.items())[:listings]:
        pictures = "".join(thumbnail(images, name) for name in listing.pictures)
        parts.append(
            f"<article><div>{pictures}</div><div><h2>{html.escape(listing.sample_id)}</h2>"
            f"<p>{html.escape(listing.text[:300])}</p><table>{''.join(rows)}</table></div></article>"
        )
    with atomic_write(path) as file:
        file.write(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Attributes</title><style>{STYLE}</style>'
            f"<h1>Attributes</h1>{''.join(parts)}</html>\n"
        )


def _row(each: Answered, line: dict) -> str:
    chains = "".join(f"<pre>{html.escape(chain.text)}</pre>" for chain in each.chains)
    withheld = ' class="withheld"' if line["abstained"] else ""
    note = " (withheld)" if line["abstained"] else ""
    return (
        f"<tr{withheld}><td>{html.escape(line['attribute'])}</td><td>{html.escape(line['value'] or '-')}{note}</td>"
        f"<td>{line['confidence']:.0%}</td><td><details><summary>{len(each.chains)} chains</summary>{chains}</details>"
        "</td></tr>"
    )
