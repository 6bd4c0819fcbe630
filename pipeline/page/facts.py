"""What the report says of the catalogue, and of the time and memory that the stages took."""

from __future__ import annotations

from html import escape

from contracts.catalog import read_table
from contracts.files import read_json
from contracts.workspace import SPLITS, Workspace
from pipeline.page.markup import data_table
from training.pictures import MISSING, NO_LINK

LISTED_REASONS = 8
LISTED_ROWS = 20
"""Rows that are named beside a problem."""
ABSENT_PICTURE = (MISSING, NO_LINK)
"""Reasons that are counted, but whose rows are not named: nothing is wrong with a file."""


def catalogue(workspace: Workspace) -> str:
    """What validation found, and the pictures that could not be used."""
    found = read_json(workspace.path("catalog"))
    names = {
        "rows": "products",
        "pictures_present": "with a picture file",
        "without_amount": "without a stated amount",
        "identical_duplicates_dropped": "identical duplicates dropped",
        "empty_texts": "empty texts",
    }
    splits = [split for split in SPLITS if split in found]  # a catalogue may have no test table
    lines = []
    for key, name in names.items():
        lines.append(("", [name, *(f"{found[split][key]:,}" for split in splits)]))
    return (
        data_table(["", *splits], lines, stack=False)
        + _price_problems(found["train"])
        + _picture_problems(workspace)
    )


def _price_problems(found: dict) -> str:
    skipped = found["bad_prices_skipped"]
    if not skipped:
        return ""
    listed = [f"{escape(sample_id)} ({escape(price)})" for sample_id, price in skipped.items()]
    return f"<p>{len(skipped)} training rows skipped for their price: {', '.join(listed[:LISTED_ROWS])}</p>"


def _picture_problems(workspace: Workspace) -> str:
    """For each embedding file: how many rows have no usable picture and why, and the damaged files by name."""
    folder = workspace.path("image_failures", name="any", split="any").parent
    parts = []
    for path in sorted(folder.glob("image_failures_*.csv")):
        table = read_table(path)
        if table.empty:
            continue
        # the details of a reason stand in brackets: they would make every damaged picture a reason of its own
        kinds = table["reason"].str.replace(r" \(.*", "", regex=True)
        reasons = kinds.value_counts()[:LISTED_REASONS]
        counts = ", ".join(f"{count:,} {escape(reason)}" for reason, count in reasons.items())
        damaged = table[~table["reason"].isin(ABSENT_PICTURE)]
        lines = [
            f"<li>{escape(row.sample_id)}: {escape(row.image)} — {escape(row.reason)}</li>"
            for row in damaged[:LISTED_ROWS].itertuples()
        ]
        name = escape(path.stem.removeprefix("image_failures_"))
        parts.append(
            f"<details><summary>Without a usable picture in <code>{name}</code>: {counts}.</summary>"
        )
        parts.append(f"<ul>{''.join(lines)}</ul></details>")
    return "".join(parts)


def stages(workspace: Workspace) -> str:
    """Seconds and peak memory of each stage, their sum, and the hardware and versions of the newest run."""
    path = workspace.path("stages")
    if not path.is_file():
        return ""
    entries = read_json(path)
    lines = []
    for entry in entries:
        module, _, arguments = entry["stage"].partition(" ")
        command = f"<code>{escape(module)}</code> <small>{escape(arguments)}</small>"
        lines.append(("", [command, f"{entry['seconds']:,.0f} s", f"{entry['peak_mb']:,} MB"]))
    seconds = sum(entry["seconds"] for entry in entries)
    memory = max((entry["peak_mb"] for entry in entries), default=0)
    total = f"{seconds / 60:,.0f} min" if seconds >= 600 else f"{seconds:,.0f} s"
    sentence = f"{total} in all, at most {memory:,} MB in one process.{_where(workspace)}"
    return f"<p>{sentence}</p>" + data_table(["stage", "time", "peak memory"], lines)


def _where(workspace: Workspace) -> str:
    manifests = list(workspace.path("run", name="any").parent.glob("*/manifest.json"))
    if not manifests:
        return ""
    manifest = read_json(max(manifests, key=lambda file: file.stat().st_mtime))
    facts = [manifest["hardware"], f"torch {manifest['packages']['torch']}", f"git {manifest['git']}"]
    return f" <small>{escape(', '.join(facts))}</small>"
