"""One page about a workspace: scores, curves, errors, problems. Self-contained html, no network needed.

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
from contracts.workspace import REPOSITORY, Workspace
from training.pictures import UnreadablePicture, open_picture
from training.settings import parse_settings

MAIN_RUN = "fusion_all_embeddings"
PLOTS = ("error_by_price.png", "error_by_group.png", "training_curves.png")
THUMBNAIL = 96  # pixels

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
    """Write report.html from whatever the workspace holds so far and return its path."""
    workspace = Workspace(root)
    sections = [
        ("Scores", scores(workspace)),
        ("The submission", submission(workspace)),
        ("Where the fusion is right and wrong", run_plots(workspace, MAIN_RUN)),
        ("Products", products(workspace)),
        ("The catalogue", catalogue(workspace)),
        (
            "Training of the encoders",
            "".join(run_plots(workspace, name) for name in ("qwen3_finetune", "clip_finetune")),
        ),
        ("Time and memory", stages(workspace)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    path = workspace.path("report")
    with atomic_write(path) as file:
        file.write(PAGE.substitute(title=f"Prices for {escape(root.resolve().name)}", body=body))
    return path


def html_table(table: pd.DataFrame, **options) -> str:
    return table.to_html(index=False, border=0, na_rep="", **options)


def picture(path: Path) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{encoded}"></p>'


def scores(workspace: Workspace) -> str:
    path = workspace.path("scores")
    if not path.is_file():
        return ""
    note = (
        "SMAPE in percent, 0 to 200, lower is better. Each model is scored on the rows of the listed folds, which "
        "neither it nor an encoder behind it was fitted or stopped on. ± is the standard error over rows."
    )
    return f'{html_table(read_table(path))}<p class="note">{note}</p>'


def submission(workspace: Workspace) -> str:
    path = workspace.path("submission")
    if not path.is_file():
        return ""
    price = read_table(path)["price"].astype(float)
    quantiles = ", ".join(f"{q:.0%} ${price.quantile(q):.2f}" for q in (0.05, 0.25, 0.5, 0.75, 0.95))
    return f"<p><code>{escape(path.name)}</code>: {len(price)} prices; {quantiles}.</p>"


def run_plots(workspace: Workspace, run: str) -> str:
    folder = workspace.path("run", name=run)
    return "".join(picture(folder / name) for name in PLOTS if (folder / name).is_file())


def products(workspace: Workspace, count: int = 8) -> str:
    """The validation products priced best and worst, with their pictures."""
    path = workspace.path("predictions", name=MAIN_RUN, split="train")
    if not path.is_file():
        return ""
    predictions = read_predictions(workspace, MAIN_RUN, "train")
    predicted = predictions.by_id[predictions.unseen]
    if predicted.empty:
        return ""
    rows = workspace.prepared("train").set_index("sample_id").loc[predicted.index]
    rows["predicted"] = predicted
    rows["SMAPE"] = smape_terms(rows["price"].to_numpy(), rows["predicted"].to_numpy())
    rows = rows.sort_values("SMAPE")
    parts = [("Furthest off", rows.iloc[::-1][:count]), ("Closest", rows[:count])]
    return "".join(f"<h3>{title}</h3>{_product_table(workspace, part)}" for title, part in parts)


def _product_table(workspace: Workspace, rows: pd.DataFrame) -> str:
    folder = workspace.images_folder()
    lines = [
        f"<tr><td>{_thumbnail(folder / row.image) if row.image else ''}</td>"
        f'<td class="text">{escape(row.entity_name[:140])}</td><td>${row.price:.2f}</td>'
        f"<td>${row.predicted:.2f}</td><td>{row.SMAPE:.0f}</td></tr>"
        for row in rows.itertuples()
    ]
    header = "<tr><th></th><th class=text>product</th><th>price</th><th>predicted</th><th>SMAPE</th></tr>"
    return f"<table>{header}{''.join(lines)}</table>"


def _thumbnail(path: Path) -> str:
    try:
        image = open_picture(path, min_side=THUMBNAIL)
    except UnreadablePicture as reason:
        return f'<span class="note">{escape(str(reason))}</span>'
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def catalogue(workspace: Workspace) -> str:
    found = read_json(workspace.path("catalog"))
    names = {
        "rows": "rows", "pictures_present": "with a picture file", "without_amount": "without a stated amount",
        "identical_duplicates_dropped": "identical duplicates dropped", "empty_texts": "empty texts",
    }  # fmt: skip
    table = pd.DataFrame(
        {"": list(names.values())}
        | {split: [found[split][key] for key in names] for split in ("train", "test")}
    )
    skipped = found["train"]["bad_prices_skipped"]
    listed = ", ".join(f"{escape(key)} ({escape(value)})" for key, value in list(skipped.items())[:20])
    problems = f"<p>{len(skipped)} training rows skipped for their price: {listed}</p>" if skipped else ""
    return html_table(table) + problems + _picture_problems(workspace)


def _picture_problems(workspace: Workspace) -> str:
    parts = []
    for path in sorted(
        workspace.path("image_failures", name="x", split="x").parent.glob("image_failures_*.csv")
    ):
        table = read_table(path)
        if table.empty:
            continue
        reasons = table["reason"].value_counts()
        counts = ", ".join(f"{count} {escape(reason)}" for reason, count in reasons[:8].items())
        damaged = table[~table["reason"].isin(["missing", "no picture named", "no link"])]
        named = "".join(
            f"<li>{escape(row.sample_id)}: {escape(row.image)} — {escape(row.reason)}</li>"
            for row in damaged[:20].itertuples()
        )
        name = path.stem.removeprefix("image_failures_")
        parts.append(
            f"<p>Without a usable picture in <code>{escape(name)}</code>: {counts}.</p><ul>{named}</ul>"
        )
    return "".join(parts)


def stages(workspace: Workspace) -> str:
    path = workspace.path("stages")
    if not path.is_file():
        return ""
    table = pd.DataFrame(read_json(path))
    manifest = workspace.path("run", name=MAIN_RUN) / "manifest.json"
    where = ""
    if manifest.is_file():
        content = read_json(manifest)
        facts = [content["hardware"], f"torch {content['packages']['torch']}", f"git {content['git']}"]
        where = f"<p>{escape(', '.join(facts))}</p>"
    total = (
        f"<p>{table['seconds'].sum():.0f} s in all, at most {table['peak_mb'].max()} MB in one process.</p>"
    )
    return html_table(table) + total + where


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ReportSettings, argv, description=__doc__.split("\n")[0])
    print(write_report(settings.workspace))


if __name__ == "__main__":
    run_entry_point(main)
