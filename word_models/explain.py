"""Which words and fields move a price: a plot for each product, and a summary over held-out rows.

    python -m word_models.explain --workspace OUT --products 3
    python -m word_models.explain --workspace OUT --ids 33127 198967

The explained networks are the very ones that price a row out of fold in `word_models.train --model mlp`: they have not
seen the row's price. What each term and field adds to ln price comes from integrated gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from tqdm import tqdm

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write
from contracts.splits import roles
from contracts.workspace import Workspace
from training.plots import figure_at
from training.settings import parse_settings
from word_models.attribution import Attribution, Catalogue, Explainer
from word_models.config import MlpSettings
from word_models.effects import by_group, by_word, effects, percent

UP_COLOR = "#c0504d"
DOWN_COLOR = "#4f81bd"
NEUTRAL_COLOR = "grey"
PRODUCT_BARS = 12
"""Effects that a product's plot shows one by one; the others are one bar together."""
SUMMARY_BARS = 20
"""Words that the summary shows in each direction."""


@dataclass
class ExplainSettings(MlpSettings):
    run: str = "words_explained"
    """Name of the folder under checkpoints/ that receives the tables and plots."""
    ids: tuple[str, ...] = ()
    """sample_ids of training or test rows to plot; empty means --products rows of the hold-out, from cheap to
    expensive."""
    products: int = 3
    """Number of products to plot where no ids are given."""
    holdout: int = 0
    """Hold-out (0 to 4) whose rows are summarised."""
    rows: int = 500
    """Number of rows in the summary, drawn at random; 0 leaves the summary out."""
    quick: bool = False
    """Train one network instead of --seeds networks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        roles(self.holdout)  # raises for a hold-out that does not exist
        for name in ("products", "rows"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.quick:
            self.seeds = 1


def main(argv: list[str] | None = None) -> Path:
    settings = parse_settings(ExplainSettings, argv, description=__doc__.split("\n")[0])
    workspace = Workspace(settings.workspace)
    catalogue = Catalogue.read(workspace)
    folder = workspace.path("run", name=settings.run)

    for holdout, named_rows in rows_by_holdout(settings, catalogue).items():
        explainer = Explainer.fit(settings, catalogue, holdout)
        products = np.array(named_rows, int) if settings.ids else explainer.spread(settings.products)
        if len(products):
            write_products(folder / "products", explainer, products)
        if settings.rows and holdout == settings.holdout:
            write_summary(folder, explainer, settings)
    return folder


def rows_by_holdout(settings: ExplainSettings, catalogue: Catalogue) -> dict[int | None, list[int]]:
    """The hold-outs whose networks are needed (None for test rows), with the positions of the --ids among their rows.

    Raises:
        InputError: an id that is in neither table.
    """
    asked: dict[int | None, list[int]] = {}
    for sample_id in settings.ids:
        holdout, row = catalogue.find(sample_id)
        asked.setdefault(holdout, []).append(row)
    if settings.rows or not settings.ids:
        asked.setdefault(settings.holdout, [])
    return asked


def write_products(folder: Path, explainer: Explainer, rows: np.ndarray) -> None:
    """A table and a plot for each of the products at these positions."""
    attribution = explainer.attribute(rows)
    table = explainer.table(rows)
    for row in range(len(table)):
        write_product(folder, explainer, table.iloc[row], attribution, row)
    print(f"{folder}: {', '.join(table['sample_id'])}")


def write_product(
    folder: Path, explainer: Explainer, product: pd.Series, attribution: Attribution, row: int
) -> None:
    """<sample_id>.csv with every effect, <sample_id>.png with the largest words and fields.

    `row` is the product's position in `attribution`.
    """
    frame = effects(explainer.catalogue, product, attribution, row)
    frame = frame.sort_values("contribution", key=np.abs, ascending=False)
    name = quote(product["sample_id"], safe="")
    write_csv(folder / f"{name}.csv", frame.assign(percent=percent(frame["contribution"])))

    bars = largest_effects(frame)
    start = np.exp(attribution.baseline)
    end = np.exp(attribution.predicted[row])
    prices = f"${start:.2f} without words and with mean amounts → ${end:.2f} predicted"
    if "price" in product:
        prices += f"; true ${product['price']:.2f}"
    title = plain_text(f"{product['sample_id']}: {product['entity_name']}", 85)
    with figure_at(folder / f"{name}.png", columns=1, width=8, height=5.2) as (figure, (axis,)):
        figure.suptitle(f"{title}\n{plain_text(prices, 100)}", fontsize=10)
        plot_effects(axis, bars.index, bars.to_numpy())
        axis.set_xlabel("effect on the price, each on top of the others")


def largest_effects(frame: pd.DataFrame) -> pd.Series:
    """Contributions by label, the PRODUCT_BARS largest ones first and the sum of the others last."""
    is_pair = frame["group"] == "word pairs"
    labels = frame["label"].where(~is_pair, "“" + frame["label"] + "”")  # a pair may be spelled like a field
    total = frame["contribution"].groupby(labels).sum().sort_values(key=np.abs, ascending=False)
    others = total.iloc[PRODUCT_BARS:]
    if len(others) == 0:
        return total
    return pd.concat([total.iloc[:PRODUCT_BARS], pd.Series({f"{len(others)} others": others.sum()})])


def write_summary(folder: Path, explainer: Explainer, settings: ExplainSettings) -> None:
    """groups.csv, words.csv and summary.png over `settings.rows` random rows of the hold-out."""
    rows = np.random.default_rng(settings.seed).permutation(explainer.rows)[: settings.rows]
    table = explainer.table(rows)
    attribution = explainer.attribute(rows)
    all_effects = []
    for row in tqdm(range(len(table)), desc="words", unit=" rows", leave=False):
        all_effects.append(effects(explainer.catalogue, table.iloc[row], attribution, row))
    groups = by_group(explainer.catalogue, attribution)
    words = by_word(all_effects)
    write_csv(folder / "groups.csv", groups)
    write_csv(folder / "words.csv", words)
    plot_summary(
        folder / "summary.png",
        groups,
        words,
        title=f"{len(rows)} products of hold-out {settings.holdout}; networks that have not seen them: "
        f"{len(explainer.networks)}",
    )
    print(f"{folder / 'summary.png'}\n" + (folder / "groups.csv").read_text())


def plot_summary(path: Path, groups: pd.DataFrame, words: pd.DataFrame, *, title: str) -> None:
    """Three panels: the size of each group, the words that raise prices, the words that lower them."""
    up = words[words["ln_price"] > 0].head(SUMMARY_BARS)
    down = words[words["ln_price"] < 0].tail(SUMMARY_BARS)[::-1]
    with figure_at(path, columns=3, width=5, height=6) as (figure, axes):
        figure.suptitle(title, fontsize=11)
        plot_effects(axes[0], groups["group"], groups["mean_abs_ln_price"].to_numpy(), up_and_down=True)
        axes[0].set(title="size of a group's net effect", xlabel="mean size of the change of the price")
        for axis, part, direction in ((axes[1], up, "up"), (axes[2], down, "down")):
            labels = [f"{word} ({count})" for word, count in zip(part["word"], part["rows"], strict=True)]
            plot_effects(axis, labels, part["ln_price"].to_numpy())
            title = f"words that move prices {direction} (products)"
            axis.set(title=title, xlabel="mean change of the price")


def plot_effects(axis: Any, labels: Any, contributions: np.ndarray, *, up_and_down: bool = False) -> None:
    """Bars in ln price, so that −50 % is as long as +100 %, labelled in percent; the first is on top.

    `up_and_down`: the contributions are sizes without a direction.
    """
    if up_and_down:
        colors = [NEUTRAL_COLOR] * len(contributions)
    else:
        colors = [UP_COLOR if value > 0 else DOWN_COLOR for value in contributions]
    lines = np.arange(len(contributions))
    bars = axis.barh(lines, contributions, color=colors)
    labels_of_bars = written_percent(contributions, sign="±" if up_and_down else None)
    axis.bar_label(bars, labels_of_bars, padding=4, fontsize=9)
    axis.set_yticks(lines, [plain_text(label, 40) for label in labels])
    axis.set_xticks([])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.margins(x=0.18)  # room for the labels at the ends of the bars


def written_percent(contributions: np.ndarray, sign: str | None = None) -> list[str]:
    """Contributions to ln price as "+12 %" and "−8 %"; with a decimal where none of them reaches 10 %.

    Args:
        sign: what stands before every number; None: its own sign.
    """
    changes = percent(np.asarray(contributions, float))
    digits = 1 if len(changes) and np.abs(changes).max() < 10 else 0
    written = []
    for change in changes:
        number = f"{sign}{change:.{digits}f}" if sign else f"{change:+z.{digits}f}"
        written.append(number.replace("-", "−") + " %")
    return written


def plain_text(text: str, length: int) -> str:
    """`text` cut to `length` and escaped, so that matplotlib shows it unchanged: there, $ begins a formula."""
    if len(text) > length:
        text = text[: length - 1] + "…"
    return text.replace("$", r"\$")


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    with atomic_write(path) as file:
        frame.round(5).to_csv(file, index=False)


if __name__ == "__main__":
    run_entry_point(main)
