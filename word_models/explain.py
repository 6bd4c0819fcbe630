"""Which words and fields move a price: a plot per product, and a summary over held-out rows.

    python -m word_models.explain --workspace OUT --products 3
    python -m word_models.explain --workspace OUT --ids 33127 198967

Explained are the very networks that price a row out of fold in `word_models.train --model mlp`: they have not seen
the row's price. What each term and field adds to ln price comes from integrated gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
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
from word_models.attribution import Attribution, Catalogue, Explainer, by_group, by_word, effects, percent
from word_models.config import WordModelSettings

UP, DOWN = "#c0504d", "#4f81bd"


@dataclass
class ExplainSettings(WordModelSettings):
    model: Literal["mlp"] = "mlp"
    """The model to explain; it is fitted here, with the settings of word_models.train."""
    name: str = "words_explained"
    """Name of the folder under checkpoints/ for tables and plots."""
    ids: tuple[str, ...] = ()
    """sample_ids of train or test to plot; empty means `products` of the hold-out, from cheap to dear."""
    products: int = 3
    """Products to plot where no ids are given."""
    holdout: int = 0
    """The summary is over rows of this hold-out (0 to 4)."""
    rows: int = 500
    """Rows of the summary, drawn at random; 0 leaves it out."""
    quick: bool = False
    """One network instead of `seeds`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        roles(self.holdout)
        for name in ("products", "rows"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.quick:
            self.seeds = 1


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    with atomic_write(path) as file:
        frame.round(5).to_csv(file, index=False)


def write_product(folder: Path, explainer: Explainer, product: pd.Series, attribution: Attribution, row: int):
    """<sample_id>.csv with every effect, <sample_id>.png with the twelve largest words and fields.

    `row` is the product's in `attribution`.
    """
    frame = effects(explainer.catalogue, product, attribution, row)
    frame = frame.sort_values("contribution", key=np.abs, ascending=False)
    name = quote(product["sample_id"], safe="")
    write_csv(folder / f"{name}.csv", frame.assign(percent=percent(frame["contribution"])))

    is_pair = frame["group"] == "word pairs"
    labels = frame["label"].where(~is_pair, "“" + frame["label"] + "”")  # a pair may be spelled like a field
    total = frame["contribution"].groupby(labels).sum().sort_values(key=np.abs, ascending=False)
    bars = total.iloc[:12]
    if len(total) > 12:
        bars = pd.concat([bars, pd.Series({f"{len(total) - 12} others": total.iloc[12:].sum()})])
    start, end = np.exp([attribution.baseline, attribution.predicted[row]])
    prices = f"${start:.2f} without words and with mean amounts → ${end:.2f} predicted"
    if "price" in product:
        prices += f"; true ${product['price']:.2f}"
    title = plain_text(f"{product['sample_id']}: {product['entity_name']}", 85)
    with figure_at(folder / f"{name}.png", columns=1, width=8, height=5.2) as (figure, (axis,)):
        figure.suptitle(f"{title}\n{plain_text(prices, 100)}", fontsize=10)
        plot_effects(axis, bars.index, bars.to_numpy())
        axis.set_xlabel("effect on the price, each on top of the others")


def write_summary(folder: Path, explainer: Explainer, rows: np.ndarray, title: str) -> None:
    """groups.csv, words.csv and summary.png."""
    table, attribution = explainer.table(rows), explainer.attribute(rows)
    groups = by_group(explainer.catalogue.names, attribution)
    bar = tqdm(range(len(table)), desc="words", unit=" rows", leave=False)
    words = by_word([effects(explainer.catalogue, table.iloc[row], attribution, row) for row in bar])
    write_csv(folder / "groups.csv", groups)
    write_csv(folder / "words.csv", words)
    up, down = words[words["ln_price"] > 0].head(20), words[words["ln_price"] < 0].tail(20)[::-1]
    with figure_at(folder / "summary.png", columns=3, width=5, height=6) as (figure, axes):
        figure.suptitle(title, fontsize=11)
        plot_effects(axes[0], groups["group"], groups["mean_abs_ln_price"].to_numpy(), up_and_down=True)
        axes[0].set(title="size of a group's net effect", xlabel="mean size of the change of the price")
        for axis, part, direction in ((axes[1], up, "up"), (axes[2], down, "down")):
            labels = [f"{word} ({count})" for word, count in zip(part["word"], part["rows"], strict=True)]
            plot_effects(axis, labels, part["ln_price"].to_numpy())
            axis.set(
                title=f"words that move prices {direction} (products)", xlabel="mean change of the price"
            )


def plot_effects(axis: Any, labels: Any, contributions: np.ndarray, *, up_and_down: bool = False) -> None:
    """Bars in ln price, so that −50 % is as long as +100 %, labelled in percent; the first is on top.

    `up_and_down`: the contributions are sizes without a direction.
    """
    colors = "grey" if up_and_down else [UP if value > 0 else DOWN for value in contributions]
    written = "±{:.0f} %" if up_and_down else "{:+z.0f} %"
    lines = np.arange(len(contributions))
    bars = axis.barh(lines, contributions, color=colors)
    axis.bar_label(bars, [written.format(percent(value)) for value in contributions], padding=3, fontsize=9)
    axis.set_yticks(lines, [plain_text(label, 40) for label in labels])
    axis.set_xticks([])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.margins(x=0.18)


def plain_text(text: str, length: int) -> str:
    """`text` as matplotlib shows it unchanged ($ begins a formula there), cut to `length`."""
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")


def main(argv: list[str] | None = None) -> Path:
    settings = parse_settings(ExplainSettings, argv, description=__doc__.split("\n")[0])
    workspace = Workspace(settings.workspace)
    folder, catalogue = workspace.path("run", name=settings.name), Catalogue.read(workspace)
    asked: dict[int | None, list[int]] = {}
    for holdout, row in map(catalogue.find, settings.ids):
        asked.setdefault(holdout, []).append(row)
    if settings.rows or not settings.ids:
        asked.setdefault(settings.holdout, [])

    for holdout, named in asked.items():
        explainer = Explainer.fit(settings, catalogue, holdout)
        products = np.array(named, int) if settings.ids else explainer.spread(settings.products)
        if len(products):
            attribution = explainer.attribute(products)
            for row, (_, product) in enumerate(explainer.table(products).iterrows()):
                write_product(folder / "products", explainer, product, attribution, row)
            print(f"{folder / 'products'}: {', '.join(explainer.table(products)['sample_id'])}")
        if settings.rows and holdout == settings.holdout:
            rows = np.random.default_rng(settings.seed).permutation(explainer.rows)[: settings.rows]
            title = (
                f"{len(rows)} rows of hold-out {holdout}, networks that have not seen them: {settings.seeds}"
            )
            write_summary(folder, explainer, rows, title)
            print(f"{folder / 'summary.png'}\n" + (folder / "groups.csv").read_text())
    return folder


if __name__ == "__main__":
    run_entry_point(main)
