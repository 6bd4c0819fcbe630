"""Which words and fields move a price: a plot per product, and a summary over held-out rows.

    python -m tfidf_models.explain --workspace OUT --products 3
    python -m tfidf_models.explain --workspace OUT --ids 33127 198967

Explained are the very networks that price a row out of fold in `tfidf_models.train --model mlp`: they have not seen
the row's price. What each term and field adds to ln price comes from integrated gradients.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import numpy as np
import pandas as pd
import scipy.sparse as sparse
from tqdm import tqdm

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write
from contracts.plots import figure_at
from contracts.settings import parse_settings
from contracts.splits import N_HOLDOUTS, roles
from contracts.workspace import Workspace
from tfidf_models.config import TfidfSettings
from tfidf_models.features import TERM_GROUPS, WORD, FeatureBuilder, Features, TermNames, structural_fields

if TYPE_CHECKING:
    from tfidf_models.sparse_mlp import FittedMlp

STEPS = 256  # of the path; on 500 real rows the sums then miss ln price by 0.0004 on average, 0.002 at most
LENGTHS = ("text length", "title length")
WORD_GROUPS = ("title words", "text words", "title pieces")
LEAST_OCCURRENCES = 20
UNITS = {"weight": " g", "volume": " ml", "count": "", "length": " m", "none": ""}
UP, DOWN = "#c0504d", "#4f81bd"


@dataclass
class ExplainSettings(TfidfSettings):
    model: Literal["mlp"] = "mlp"
    """The model to explain; it is fitted here, with the settings of tfidf_models.train."""
    name: str = "tfidf_explained"
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


@dataclass
class Catalogue:
    """Both prepared tables with their features, in the same order."""

    tables: dict[str, pd.DataFrame]
    features: dict[str, Features]
    fold: np.ndarray
    """(N,) int, of the training rows"""
    builder: FeatureBuilder
    names: TermNames

    @classmethod
    def read(cls, workspace: Workspace) -> Catalogue:
        tables = {split: workspace.prepared(split) for split in ("train", "test")}
        fold = workspace.folds().reindex(tables["train"]["sample_id"]).to_numpy()
        builder = FeatureBuilder(tables["train"])
        features = {split: builder(table) for split, table in tables.items()}
        return cls(tables, features, fold, builder, builder.term_names())

    def held_out(self, holdout: int | None) -> np.ndarray:
        """(N,) bool: the training rows of a hold-out; of None, no row."""
        return np.isin(self.fold, roles(holdout).validate)

    def find(self, sample_id: str) -> tuple[int | None, int]:
        """Hold-out (None for a test row) and position of a product. Raises InputError for an unknown id."""
        for split, table in self.tables.items():
            for row in np.flatnonzero(table["sample_id"] == sample_id):
                if split == "test":
                    return None, row
                return next(k for k in range(N_HOLDOUTS) if self.held_out(k)[row]), row
        raise InputError(f"--ids {sample_id}: neither in prepared_train.csv nor in prepared_test.csv")


@dataclass
class Attribution:
    """What moves ln price from the baseline to the prediction of n rows; all contributions of a row sum to that."""

    terms: sparse.csr_matrix
    """(n, V)"""
    structural: np.ndarray
    """(n, S)"""
    baseline: float
    """ln price of a product without any term and with mean structural features"""
    predicted: np.ndarray
    """(n,) ln price"""


def integrated_gradients(network: FittedMlp, features: Features, baseline: np.ndarray) -> Attribution:
    """Attribute ln price by integrated gradients from no terms and structural features `baseline` (S,).

        IG_i = (x_i − x'_i) ∫₀¹ ∂f/∂x_i (x' + α (x − x')) dα

    Sundararajan et al. 2017, "Axiomatic attribution for deep networks", equation 1, by the midpoint rule. The first
    layer's sum z is linear in x, so ∂f/∂x_i = W_i · ∂f/∂z, and the path is walked once a row in the width of z
    rather than once a term.
    """
    import torch

    from tfidf_models.sparse_mlp import as_tensors

    mlp, counts = network.network, np.diff(features.terms.indptr)
    indices, offsets, values, structural = as_tensors(features)
    with torch.no_grad():
        start = mlp.structural(torch.from_numpy(baseline)[None])  # (1, hidden)
        moved = mlp.terms(indices, offsets, per_sample_weights=values) + mlp.structural(structural) - start
        ends = [
            mlp.layers(z)[:, 0].double().numpy() * network.scale + network.mean
            for z in (start, start + moved)
        ]
    gradient = torch.zeros_like(moved)
    for step in range(STEPS):
        z = (start + (step + 0.5) / STEPS * moved).requires_grad_()
        gradient += torch.autograd.grad(mlp.layers(z).sum(), z)[0] * (network.scale / STEPS)
    with torch.no_grad():
        slope = mlp.terms.weight[indices] * gradient.repeat_interleave(torch.from_numpy(counts), dim=0)
        terms = (values * slope.sum(dim=1)).double().numpy()
        by_column = (structural - torch.from_numpy(baseline)) * (gradient @ mlp.structural.weight)
    matrix = sparse.csr_matrix((terms, features.terms.indices, features.terms.indptr), features.terms.shape)
    return Attribution(matrix, by_column.double().numpy(), float(ends[0][0]), ends[1])


@dataclass
class Explainer:
    """Networks that have not seen the rows they explain."""

    catalogue: Catalogue
    split: str
    rows: np.ndarray
    """positions in the split's table that may be explained"""
    networks: list[FittedMlp]
    """what is explained is the mean of their ln prices"""
    baseline: np.ndarray
    """(S,) mean structural features of the fitted rows"""

    @classmethod
    def fit(cls, settings: ExplainSettings, catalogue: Catalogue, holdout: int | None) -> Explainer:
        """Fit on the rows outside the hold-out; None fits on all rows, to explain test rows."""
        from tfidf_models.sparse_mlp import fit_mlp

        held_out = catalogue.held_out(holdout)
        known = catalogue.features["train"][~held_out]
        ln_price = np.log(catalogue.tables["train"]["price"].to_numpy()[~held_out])
        seeds = range(settings.seed, settings.seed + settings.seeds)
        networks = [fit_mlp(settings, known, ln_price, seed) for seed in seeds]
        split = "test" if holdout is None else "train"
        rows = np.arange(len(catalogue.tables["test"])) if holdout is None else np.flatnonzero(held_out)
        return cls(catalogue, split, rows, networks, known.structural.mean(axis=0))

    def table(self, rows: np.ndarray) -> pd.DataFrame:
        return self.catalogue.tables[self.split].iloc[rows]

    def spread(self, count: int) -> np.ndarray:
        """Positions of `count` rows, evenly from the cheapest to the dearest prediction."""
        features = self.catalogue.features[self.split][self.rows]
        predicted = np.mean([network.predict(features) for network in self.networks], axis=0)
        at = (np.arange(count) + 0.5) / max(count, 1) * len(predicted)
        return self.rows[np.unique(np.argsort(predicted, kind="stable")[at.astype(int)])]

    def attribute(self, rows: np.ndarray) -> Attribution:
        """Integrated gradients of the networks' mean at these positions, 256 rows at a time."""
        parts = []
        for some in np.split(rows, range(256, len(rows), 256)):
            features = self.catalogue.features[self.split][some]
            each = [integrated_gradients(network, features, self.baseline) for network in self.networks]
            parts.append(
                Attribution(
                    sum(part.terms for part in each) / len(each),
                    np.mean([part.structural for part in each], axis=0),
                    float(np.mean([part.baseline for part in each])),
                    np.mean([part.predicted for part in each], axis=0),
                )
            )
        return Attribution(
            sparse.vstack([part.terms for part in parts], format="csr"),
            np.concatenate([part.structural for part in parts]),
            parts[0].baseline,
            np.concatenate([part.predicted for part in parts]),
        )


# From columns to words and fields


def pieces_to_words(builder: FeatureBuilder, title: str, pieces: dict[str, float]) -> list[tuple[str, float]]:
    """Give each title piece's contribution to the words that it is cut from.

    It is shared among all places it occurs at; where it is cut from several words ("all-natural"), by their lengths.
    """
    owners: dict[str, Counter] = {}
    for token in title.lower().split():
        words = re.findall(WORD, token) or [token]
        for piece in builder.pieces_of(token):
            owners.setdefault(piece, Counter()).update({word: len(word) for word in words})
    return [
        (word, contribution * share / owners[piece].total())
        for piece, contribution in pieces.items()
        for word, share in owners[piece].items()
    ]


def effects(catalogue: Catalogue, product: pd.Series, attribution: Attribution, row: int) -> pd.DataFrame:
    """What moves the price of one product: columns label, group, contribution (ln price), one line an effect.

    Groups are those of the terms, "amounts" and "lengths"; title pieces are given to the words they come from.
    """
    terms, names = attribution.terms[row], catalogue.names
    frame = pd.DataFrame(
        {"label": names.text[terms.indices], "group": names.group[terms.indices], "contribution": terms.data}
    )
    is_piece = frame["group"] == "title pieces"
    pieces = dict(zip(frame["label"][is_piece], frame["contribution"][is_piece], strict=True))
    words = pd.DataFrame(
        pieces_to_words(catalogue.builder, product["entity_name"], pieces), columns=["label", "contribution"]
    ).assign(group="title pieces")
    fields = pd.DataFrame({"field": structural_fields(), "contribution": attribution.structural[row]})
    fields = fields.groupby("field", sort=False, as_index=False).sum()
    fields["group"] = np.where(fields["field"].isin(LENGTHS), "lengths", "amounts")
    fields["label"] = [f"{field}: {field_value(product, field)}" for field in fields["field"]]
    columns = ["label", "group", "contribution"]
    parts = [part[columns] for part in (frame[~is_piece], words, fields) if len(part)]
    return pd.concat(parts).groupby(["label", "group"], sort=False, as_index=False).sum()


def field_value(product: pd.Series, field: str) -> str:
    if field in LENGTHS:
        return f"{len(product['catalog_content' if field == 'text length' else 'entity_name'])} letters"
    if field == "unit kind":
        return product["unit_kind"]
    value = product[field.replace(" ", "_")]
    if pd.isna(value):
        return "not stated"
    return f"{value:g}" if field == "pack count" else f"{value:,.4g}{UNITS[product['unit_kind']]}"


def by_group(names: TermNames, attribution: Attribution) -> pd.DataFrame:
    """Mean absolute net contribution of each group to ln price, and the same as percent of the price."""
    fields = structural_fields()
    net = {group: attribution.terms @ (names.group == group).astype(float) for group in TERM_GROUPS}
    net["amounts"] = attribution.structural[:, ~np.isin(fields, LENGTHS)].sum(axis=1)
    net["lengths"] = attribution.structural[:, np.isin(fields, LENGTHS)].sum(axis=1)
    size = np.array([np.abs(values).mean() for values in net.values()])
    frame = pd.DataFrame({"group": list(net), "mean_abs_ln_price": size, "percent": percent(size)})
    return frame.sort_values("mean_abs_ln_price", ascending=False, ignore_index=True)


def by_word(all_effects: list[pd.DataFrame]) -> pd.DataFrame:
    """Mean contribution of each word to the products that have it, highest first.

    Columns word, rows (products that have it, at least LEAST_OCCURRENCES), ln_price, percent.
    """
    words = pd.concat(
        frame[frame["group"].isin(WORD_GROUPS)].groupby("label")["contribution"].sum()
        for frame in all_effects
    )
    grouped = words.groupby(level=0)
    table = pd.DataFrame({"rows": grouped.size(), "ln_price": grouped.mean()}).query(
        f"rows >= {LEAST_OCCURRENCES}"
    )
    table = table.assign(percent=percent(table["ln_price"])).rename_axis("word").reset_index()
    return table.sort_values("ln_price", ascending=False, ignore_index=True)


def percent(ln_price: Any) -> Any:
    """A contribution to ln price as a change of the price in percent."""
    return 100 * np.expm1(ln_price)


# Files


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
