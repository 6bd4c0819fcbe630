"""Write one page about a workspace: its scores, curves, errors and problems.

The page is a single html file that needs no network.

python -m pipeline.report --workspace OUT
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import pandas as pd

from contracts.catalog import read_table
from contracts.errors import run_entry_point
from contracts.files import atomic_write, read_json
from contracts.predictions import read_predictions
from contracts.smape import smape_terms
from contracts.workspace import REPOSITORY, SPLITS, Workspace
from training.pictures import MISSING, NO_LINK, UnreadablePicture, open_picture
from training.settings import parse_settings

FUSION = "fusion_all_embeddings"
ENSEMBLE = "ensemble"
ENCODER_RUNS = ("qwen3_finetune", "clip_finetune")
PLOTS = ("error_by_price.png", "error_by_group.png", "training_curves.png")
PRICE_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
THUMBNAIL = 96
"""Pixels of a product picture's longer side."""
LONGEST_TEXT = 140
"""Characters of a product's name that are shown."""
LISTED_REASONS = 8
LISTED_ROWS = 20
"""Rows that are named beside a problem."""
ABSENT_PICTURE = (MISSING, NO_LINK)
"""Reasons that are counted, but whose rows are not named: nothing is wrong with a file."""

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left } .text { text-align: left; max-width: 26rem }
img { max-width: 100% } td img { display: block } .note { color: #666 } code { background: #f4f4f4; padding: 0 .3em }
</style></head><body><h1>$title</h1>$body</body></html>
""")


@dataclass
class ReportSettings:
    workspace: Path = REPOSITORY
    """Folder to report on; report.html is written there."""


def write_report(root: Path) -> Path:
    """Write report.html from whatever the workspace holds so far, and return its path."""
    workspace = Workspace(root)
    run = main_run(workspace)
    sections = {
        "Scores": scores(workspace),
        "The ensemble": members(workspace),
        "The submission": submission(workspace),
        "Where the prices are right and wrong": run_plots(workspace, run),
        "Products": products(workspace, run),
        "The catalogue": catalogue(workspace),
        "Training of the encoders": "".join(run_plots(workspace, run) for run in ENCODER_RUNS),
        "Time and memory": stages(workspace),
    }
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections.items() if content)
    title = f"Prices for {escape(root.resolve().name)}"
    path = workspace.path("report")
    with atomic_write(path) as file:
        file.write(PAGE.substitute(title=title, body=body))
    return path


def main_run(workspace: Workspace) -> str:
    """The run that the page is about: the ensemble if there is one, as it then writes the submission."""
    return ENSEMBLE if (workspace.path("run", name=ENSEMBLE) / "summary.json").is_file() else FUSION


# Each section is a piece of html, "" where the workspace has nothing to show.


def scores(workspace: Workspace) -> str:
    """The score table."""
    path = workspace.path("scores")
    if not path.is_file():
        return ""
    note = (
        "SMAPE in percent, 0 to 200, lower is better. Each model is scored on the rows of the listed folds, which "
        "neither it nor an encoder behind it was fitted or stopped on. ± is the standard error over rows."
    )
    return f'{html_table(read_table(path))}<p class="note">{note}</p>'


def members(workspace: Workspace) -> str:
    """The models of the ensemble, and how often its intervals hold the price."""
    path = workspace.path("run", name=ENSEMBLE) / "summary.json"
    if not path.is_file():
        return ""
    summary = read_json(path)
    table = pd.DataFrame(summary["members"]).round(3)
    table.columns = ["model", "SMAPE alone", "weight", "SMAPE of the ensemble without it"]
    covers = ", ".join(
        f"the {level} interval holds {share:.1%}" for level, share in summary["coverage"].items()
    )
    note = f"Of the prices of held-out rows, {covers}."
    return f'{html_table(table)}<p class="note">{note}</p>'


def submission(workspace: Workspace) -> str:
    """How many prices the submission has, and their quantiles."""
    path = workspace.path("submission")
    if not path.is_file():
        return ""
    price = read_table(path)["price"].astype(float)
    quantiles = [f"{share:.0%} ${price.quantile(share):.2f}" for share in PRICE_QUANTILES]
    return f"<p><code>{escape(path.name)}</code>: {len(price)} prices; {', '.join(quantiles)}.</p>"


def run_plots(workspace: Workspace, run: str) -> str:
    """Those of PLOTS that the run folder has."""
    folder = workspace.path("run", name=run)
    return "".join(plot(folder / name) for name in PLOTS if (folder / name).is_file())


def products(workspace: Workspace, run: str, count: int = 8) -> str:
    """The `count` products priced worst and best among those that are new to the model, with their pictures."""
    path = workspace.path("predictions", name=run, split="train")
    if not path.is_file():
        return ""
    predictions = read_predictions(workspace, run, "train")
    predicted = predictions.by_id[predictions.unseen]
    if predicted.empty:
        return ""
    rows = workspace.prepared("train").set_index("sample_id").loc[predicted.index]
    rows["predicted"] = predicted
    rows["smape"] = smape_terms(rows["price"].to_numpy(), predicted.to_numpy())
    rows = rows.sort_values("smape")
    closest = rows.head(count)
    furthest = rows.tail(count)[::-1]
    return (
        f"<h3>Furthest off</h3>{_product_table(workspace, furthest)}"
        f"<h3>Closest</h3>{_product_table(workspace, closest)}"
    )


def _product_table(workspace: Workspace, rows: pd.DataFrame) -> str:
    folder = workspace.images_folder()
    header = "<tr><th></th><th class=text>product</th><th>price</th><th>predicted</th><th>SMAPE</th></tr>"
    lines = [header]
    for row in rows.itertuples():
        picture = _thumbnail(folder / row.image) if row.image else ""
        lines.append(
            f'<tr><td>{picture}</td><td class="text">{escape(row.entity_name[:LONGEST_TEXT])}</td>'
            f"<td>${row.price:.2f}</td><td>${row.predicted:.2f}</td><td>{row.smape:.0f}</td></tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def _thumbnail(path: Path) -> str:
    """The picture as a small JPEG inside the page, or the reason why it cannot be shown."""
    try:
        image = open_picture(path, min_side=THUMBNAIL)
    except UnreadablePicture as reason:
        return f'<span class="note">{escape(str(reason))}</span>'
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{_base64(buffer.getvalue())}">'


def catalogue(workspace: Workspace) -> str:
    """What validation found, and the pictures that could not be used."""
    found = read_json(workspace.path("catalog"))
    names = {
        "rows": "rows",
        "pictures_present": "with a picture file",
        "without_amount": "without a stated amount",
        "identical_duplicates_dropped": "identical duplicates dropped",
        "empty_texts": "empty texts",
    }
    counts = pd.DataFrame({"": list(names.values())})
    for split in SPLITS:
        if split in found:  # a catalogue may have no test table
            counts[split] = [found[split][key] for key in names]
    return html_table(counts) + _price_problems(found["train"]) + _picture_problems(workspace)


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
        counts = ", ".join(f"{count} {escape(reason)}" for reason, count in reasons.items())
        damaged = table[~table["reason"].isin(ABSENT_PICTURE)]
        lines = [
            f"<li>{escape(row.sample_id)}: {escape(row.image)} — {escape(row.reason)}</li>"
            for row in damaged[:LISTED_ROWS].itertuples()
        ]
        name = path.stem.removeprefix("image_failures_")
        parts.append(f"<p>Without a usable picture in <code>{escape(name)}</code>: {counts}.</p>")
        parts.append(f"<ul>{''.join(lines)}</ul>")
    return "".join(parts)


def stages(workspace: Workspace) -> str:
    """Seconds and peak memory of each stage, their sum, and the hardware and versions of the main run."""
    path = workspace.path("stages")
    if not path.is_file():
        return ""
    table = pd.DataFrame(read_json(path))[["stage", "seconds", "peak_mb"]]
    seconds = f"{table['seconds'].sum():.0f} s in all"
    memory = f"at most {table['peak_mb'].max()} MB in one process"
    return f"{html_table(table)}<p>{seconds}, {memory}.</p>{_where(workspace)}"


def _where(workspace: Workspace) -> str:
    manifests = list(workspace.path("run", name="any").parent.glob("*/manifest.json"))
    if not manifests:
        return ""
    manifest = read_json(max(manifests, key=lambda file: file.stat().st_mtime))
    facts = [manifest["hardware"], f"torch {manifest['packages']['torch']}", f"git {manifest['git']}"]
    return f"<p>{escape(', '.join(facts))}</p>"


def html_table(table: pd.DataFrame) -> str:
    return table.to_html(index=False, border=0, na_rep="")


def plot(path: Path) -> str:
    """A png inside the page."""
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{_base64(path.read_bytes())}"></p>'


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ReportSettings, argv, description=__doc__.split("\n")[0])
    print(write_report(settings.workspace))


if __name__ == "__main__":
    run_entry_point(main)
