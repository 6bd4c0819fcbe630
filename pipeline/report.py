"""Write one page about a workspace: its scores, where its prices are right and wrong, and the problems of its data.

The page is a single html file that needs no network and no script. It follows the reader's light or dark theme.

python -m pipeline.report --workspace OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd

from contracts.catalog import ColumnMapping, read_table
from contracts.errors import run_entry_point
from contracts.files import atomic_write, read_json
from contracts.smape import smape_with_error
from contracts.workspace import REPOSITORY, Workspace
from pipeline.page.accuracy import coverage, errors, predicted_and_true
from pipeline.page.facts import catalogue, stages
from pipeline.page.held_out import ENSEMBLE, HeldOut, read_held_out
from pipeline.page.markup import breakable, data_table, money, percent
from pipeline.page.training_runs import experts, learning_curves
from pipeline.page.worst_products import furthest_off
from pipeline.scores import BEST_POSSIBLE, CONSTANT, LABELS, NO_BETTER, score_table
from training.settings import parse_settings

# The policy forbids the page to load or run anything, whatever a product's text contains.
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title><style>$style</style></head>
<body><header><p class="kicker">Price report</p><h1>$title</h1>$summary<nav>$links</nav></header>
<main>$sections</main></body></html>
""")


@dataclass
class ReportSettings:
    workspace: Path = REPOSITORY
    """Folder to report on; report.html is written there."""


def write_report(root: Path) -> Path:
    """Write report.html from whatever the workspace holds so far, and return its path."""
    workspace = Workspace(root)
    held_out = read_held_out(workspace)
    sections = {
        "Scores": scores(workspace, held_out),
        "Where the error is": errors(workspace, held_out),
        "Predicted and true prices": predicted_and_true(held_out),
        "Intervals": coverage(held_out),
        "Furthest off": furthest_off(workspace, held_out),
        "Experts": experts(workspace),
        "Learning curves": learning_curves(workspace),
        "The catalogue": catalogue(workspace),
        "Time and memory": stages(workspace),
    }
    filled = {title: content for title, content in sections.items() if content}
    links = [f'<a href="#{_anchor(title)}">{title}</a>' for title in filled]
    parts = [f'<section id="{_anchor(title)}"><h2>{title}</h2>{filled[title]}</section>' for title in filled]
    page = PAGE.substitute(
        title=escape(root.resolve().name),
        style=Path(__file__).with_name("page").joinpath("page.css").read_text("utf-8"),
        summary=summary(workspace, held_out),
        links="".join(links),
        sections="".join(parts),
    )
    path = workspace.path("report")
    with atomic_write(path) as file:
        file.write(page)
    return path


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


# Each section is a piece of html, "" where the workspace has nothing to show.


def summary(workspace: Workspace, held_out: HeldOut | None) -> str:
    """The few numbers that matter most."""
    tiles = []
    if held_out is not None:
        price = held_out.rows["price"].to_numpy()
        predicted = held_out.rows["predicted"].to_numpy()
        error, uncertainty = smape_with_error(price, predicted)
        typical = np.median(np.abs(predicted - price) / price)
        tiles.append(
            (f"{error:.1f}<small> ± {uncertainty:.1f}</small>", f"SMAPE on {len(price):,} unseen products")
        )
        tiles.append((percent(typical), "typical error: half of the prices are closer to the truth"))
        for level, interval in held_out.intervals.items():
            share = interval["inside"].mean()
            tiles.append((percent(share, 1), f"of the true prices lie in their {percent(level)} interval"))
    submission = workspace.path("submission")
    if submission.is_file():
        mapping = ColumnMapping.from_json(read_json(workspace.path("catalog")))
        price = read_table(submission)["price"].astype(float)
        median = escape(money(price.median(), mapping.currency))
        tiles.append((f"{len(price):,}", f"prices in {escape(submission.name)}, median {median}"))
    written = [f'<div class="tile"><b>{number}</b><span>{meaning}</span></div>' for number, meaning in tiles]
    return f'<div class="tiles">{"".join(written)}</div>' if tiles else ""


def scores(workspace: Workspace, held_out: HeldOut | None) -> str:
    """Every model with its honest score; a member of the ensemble with its weight and the score without it."""
    path = workspace.path("scores")
    table = read_table(path) if path.is_file() else score_table(workspace).fillna("").astype(str)
    table["order"] = pd.to_numeric(table["validation SMAPE"]).fillna(np.inf)
    members = _members(workspace)
    columns = {"validation SMAPE": "SMAPE"}
    columns |= {name: name for name in ("leaked SMAPE", "test SMAPE") if name in table}
    headings = ["model", *columns.values()]
    headings += ["weight", "SMAPE without it"] if members else []
    headings += ["products", "folds"]
    main = LABELS.get(held_out.run, held_out.run) if held_out else ""
    lines = []
    for line in table.sort_values("order", kind="stable").to_dict("records"):
        name = line["model"]
        note = line.get("note", "")
        cells = [_model_cell(name, note, is_member=name in members)]
        for column in columns:
            has_error = column != "test SMAPE" and line[column] and line.get("±")
            cells.append(line[column] + (f" <small>± {line['±']}</small>" if has_error else ""))
        if members:
            member = members.get(name)
            cells.append(percent(member["weight"]) if member else "")
            without = member["smape_without_it"] if member else None
            cells.append(f"{without:.2f}" if without is not None and np.isfinite(without) else "")
        rows = line["rows"].removesuffix(".0")
        cells.append(f"{int(rows):,}" if rows else "")
        cells.append("all" if line["folds"] == "0 1 2 3 4 5 6 7 8 9" else line["folds"])
        kind = "main" if name == main else "reference" if name in (CONSTANT, BEST_POSSIBLE) else ""
        lines.append((kind, cells))
    note = (
        "SMAPE is the mean of |predicted − true| over the mean of the two prices, in percent: 0 is perfect, 200 the "
        "worst. Each model is scored only on products that neither it nor an encoder behind it was fitted or stopped "
        "on. ± is the standard error over products. The constant is the one price for everything that fits best."
    )
    bad = [line["model"] for line in table.to_dict("records") if line.get("note") == NO_BETTER]
    warning = ""
    if bad:
        names = ", ".join(f"<b>{escape(name)}</b>" for name in bad)
        warning = f'<p class="warning">No better than one price for everything: {names}.</p>'
    return f'{warning}{data_table(headings, lines)}<p class="note">{note}</p>'


def _members(workspace: Workspace) -> dict[str, dict]:
    """By label of the score table: weight and smape_without_it of each member of the ensemble."""
    path = workspace.path("run", name=ENSEMBLE) / "summary.json"
    if not path.is_file():
        return {}
    return {LABELS.get(line["model"], line["model"]): line for line in read_json(path).get("members", [])}


def _model_cell(name: str, note: str, *, is_member: bool) -> str:
    badges = '<span class="badge">member</span>' if is_member else ""
    badges += f'<span class="badge bad">{escape(note)}</span>' if note else ""
    return f"{breakable(name)} {badges}"


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ReportSettings, argv, description=__doc__.split("\n")[0])
    print(write_report(settings.workspace))


if __name__ == "__main__":
    run_entry_point(main)
