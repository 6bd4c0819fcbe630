"""What a finished fusion model looks at: over all validation rows, and for one product.

Over all rows there is permutation importance (Breiman 2001, "Random forests", section 10; Fisher et al.
2019): how much worse the SMAPE becomes when an embedding is dealt out among the products at random. For one
product there are exact Shapley values of its modalities: how each of them moves the price from what the model
says about nothing.

Legend: n explained rows, M modalities, D_in encoder width.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from contracts.errors import InputError
from contracts.files import atomic_write
from contracts.smape import smape
from contracts.workspace import STRUCTURAL_FEATURES
from fusion.config import TABULAR
from fusion.dataset import FusionTable
from fusion.finished import TrainedModel, validation_rows
from fusion.loop import predict
from training.plots import figure_at

UP = "#c0504d"
DOWN = "#4f81bd"


def take_rows(table: FusionTable, rows: Tensor) -> FusionTable:
    """A table of only the rows at these positions."""
    embeddings, valid = table.take(rows.to(table.valid.device))
    frame = table.rows.iloc[rows.numpy()].reset_index(drop=True)
    return FusionTable.of(frame, embeddings, valid, table.meta)


def ln_price(trained: TrainedModel, table: FusionTable) -> np.ndarray:
    """Natural logarithm of the predicted dollars of every row, (n,) float64."""
    log_price = predict(trained.model, table, torch.arange(len(table.rows)), trained.target)
    return np.log(np.expm1(log_price.double().numpy()))


# Permutation importance


def importance_groups(table: FusionTable) -> dict[str, tuple[str, ...]]:
    """What is dealt out together: each embedding that was read, the table's own columns, and all of a kind.

    Two embeddings of one picture stand in for each other, so each alone seems to matter less than the picture
    does.
    """
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in table.meta}
    if TABULAR in table.widths:
        groups[TABULAR] = (TABULAR,)
    for kind in ("image", "text"):
        names = tuple(name for name in table.meta if name.endswith(kind))
        if len(names) > 1:
            groups[f"all {kind}s"] = names
    return groups


def permuted(table: FusionTable, names: tuple[str, ...], order: Tensor) -> FusionTable:
    """Row i gets the embeddings `names` of row order[i], and with them whether they are there."""
    order = order.to(table.valid.device)
    embeddings = table.embeddings
    valid = table.valid.clone()
    for name in names:
        embeddings[name] = embeddings[name].index_select(0, order)
        column = list(table.widths).index(name)
        valid[:, column] = table.valid[order, column]
    return FusionTable.of(table.rows, embeddings, valid, table.meta)


def permuted_columns(table: FusionTable, name: str, count: int, generator: torch.Generator) -> FusionTable:
    """The last `count` columns of one embedding dealt out among the rows that have it."""
    column = list(table.widths).index(name)
    rows = table.valid[:, column].nonzero()[:, 0]
    order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
    embedding = table.embeddings[name].clone()
    embedding[rows, -count:] = table.embeddings[name][order, -count:]
    return FusionTable.of(table.rows, table.embeddings | {name: embedding}, table.valid, table.meta)


def permutation_importance(
    trained: TrainedModel, table: FusionTable, *, repeats: int, seed: int
) -> pd.DataFrame:
    """SMAPE increase of each group of inputs when it is permuted, most important first.

    Returns:
        DataFrame group, smape_increase (mean over the repeats, in SMAPE points), spread (their standard
        deviation).
    """
    price = table.rows["price"].to_numpy()
    generator = torch.Generator().manual_seed(seed)
    n_amounts = len(STRUCTURAL_FEATURES)
    groups = importance_groups(table)
    amounts: dict[
        str, str
    ] = {}  # the group, and the embedding whose last columns are the structural features
    for name, meta in table.meta.items():
        last_columns = meta.get("last_columns", ())[-n_amounts:]
        if tuple(last_columns) == STRUCTURAL_FEATURES:
            amounts[f"amounts in {name}"] = name

    def smape_of(changed: FusionTable) -> float:
        return smape(price, np.exp(ln_price(trained, changed)))

    unchanged = smape_of(table)
    increases: dict[str, list[float]] = {group: [] for group in (*groups, *amounts)}
    for _ in tqdm(range(repeats), desc="permutation importance", unit=" repeats", leave=False):
        order = torch.randperm(len(price), generator=generator)
        for group, names in groups.items():
            increases[group].append(smape_of(permuted(table, names, order)) - unchanged)
        for group, name in amounts.items():
            changed = permuted_columns(table, name, n_amounts, generator)
            increases[group].append(smape_of(changed) - unchanged)
    result = pd.DataFrame(
        {
            "group": list(increases),
            "smape_increase": [np.mean(values) for values in increases.values()],
            "spread": [np.std(values, ddof=1) if repeats > 1 else np.nan for values in increases.values()],
        }
    )
    return result.sort_values("smape_increase", ascending=False, ignore_index=True)


# Shapley values


def shapley_values(trained: TrainedModel, table: FusionTable) -> tuple[np.ndarray, np.ndarray]:
    """Exact Shapley values of the modalities, in ln price.

        φ_i = Σ_{S ⊆ M∖{i}} |S|! (M − |S| − 1)! / M! · (v(S ∪ {i}) − v(S))

    where v(S) is ln price with all modalities outside S masked, which takes 2^M forward passes. Shapley 1953,
    "A value for n-person games"; as an explanation of a model: Lundberg & Lee 2017, equation 4. Masking is
    what modality dropout trained the model for, except that it never saw a row without any modality: v(∅) is
    what it says of nothing.

    Returns:
        values (n, M), zero for a modality that the row lacks, and v(∅) (n,). values.sum(1) + v(∅) is ln
        price.
    """
    players = len(table.widths)
    subsets: list[tuple[int, ...]] = []
    for size in range(players + 1):
        subsets += combinations(range(players), size)

    outcome: dict[tuple[int, ...], np.ndarray] = {}  # v of each subset
    for subset in tqdm(subsets, desc="Shapley values", unit=" passes", leave=False):
        kept = torch.zeros(players, dtype=torch.bool, device=table.valid.device)
        kept[list(subset)] = True
        outcome[subset] = ln_price(trained, replace(table, valid=table.valid & kept))

    values = np.zeros((len(table.rows), players))
    for player in range(players):
        for subset in subsets:
            if player in subset:
                continue
            joined = tuple(sorted((*subset, player)))
            # |S|! (M − |S| − 1)! / M! = 1 / (M · (M − 1 choose |S|))
            weight = 1 / (players * comb(players - 1, len(subset)))
            values[:, player] += weight * (outcome[joined] - outcome[subset])
    return values, outcome[()]


def choose_products(table: FusionTable, ids: tuple[str, ...], count: int, predicted: np.ndarray) -> Tensor:
    """Positions of the named rows, or of `count` rows spread evenly from low to high prediction.

    Raises InputError for an id that is not in the table.
    """
    if not ids:
        # the middle row of each of `count` equal parts
        at = (np.arange(count) + 0.5) / max(count, 1) * len(predicted)
        cheapest_first = np.argsort(predicted, kind="stable")
        return torch.from_numpy(np.unique(cheapest_first[at.astype(int)]))
    position = {sample_id: row for row, sample_id in enumerate(table.rows["sample_id"])}
    if unknown := [sample_id for sample_id in ids if sample_id not in position]:
        raise InputError(f"--ids {', '.join(unknown)}: not among the run's {len(position)} validation rows")
    return torch.tensor([position[sample_id] for sample_id in ids])


# Files


def explain(
    trained: TrainedModel,
    *,
    ids: tuple[str, ...],
    products: int,
    repeats: int,
    seed: int,
) -> pd.DataFrame:
    """Write the summary of a finished run and a plot per product into its folder; returns the summary.

    explanation/ gets importance.csv, importance.png, products.csv (one row per product) and
    products/<sample_id>.png.
    """
    table, rows, name = validation_rows(trained)
    table = take_rows(table, rows)
    predicted = ln_price(trained, table)
    chosen = take_rows(table, choose_products(table, ids, products, predicted))
    if trained.settings.modality_dropout == 0:
        print("trained without --modality-dropout: what the model makes of a masked modality is a guess")
    folder = trained.folder / "explanation"
    price = table.rows["price"].to_numpy()
    importance = permutation_importance(trained, table, repeats=repeats, seed=seed)
    write_csv(folder / "importance.csv", importance.assign(rows=len(table.rows), score=name))
    title = f"{trained.run}: {name} SMAPE {smape(price, np.exp(predicted)):.2f} on {len(price)} rows"
    plot_importance(folder / "importance.png", importance, title=title)
    print(importance.round(3).to_string(index=False))

    values, nothing = shapley_values(trained, chosen)
    factors = pd.DataFrame(np.exp(values), columns=[f"factor_{modality}" for modality in table.widths])
    frame = chosen.rows[["sample_id", "price"]].assign(
        predicted=np.exp(values.sum(axis=1) + nothing), nothing_known=np.exp(nothing)
    )
    write_csv(folder / "products.csv", pd.concat([frame, factors], axis=1))
    for row, sample_id in enumerate(frame["sample_id"]):
        file = folder / "products" / f"{quote(sample_id, safe='')}.png"
        plot_product(file, chosen, row, values[row], nothing[row])
    print(f"{folder}: importance.png and {len(values)} products")
    return importance


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    with atomic_write(path) as file:
        frame.round(5).to_csv(file, index=False)


def plot_importance(path: Path, importance: pd.DataFrame, *, title: str) -> None:
    shown = importance[::-1]
    with figure_at(path, columns=1, width=7.5, height=1.4 + 0.4 * len(shown)) as (figure, (axis,)):
        figure.suptitle(title, fontsize=10)
        bars = axis.barh(
            shown["group"], shown["smape_increase"], xerr=shown["spread"].fillna(0), color=DOWN, capsize=3
        )
        axis.bar_label(bars, [f"{value:+.2f}" for value in shown["smape_increase"]], padding=4, fontsize=9)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.margins(x=0.15)
        axis.set(xlabel="SMAPE points worse when dealt out at random; line: spread of the repeats")


def plot_product(path: Path, table: FusionTable, row: int, values: np.ndarray, nothing: float) -> None:
    """A waterfall in dollars on a log axis: each modality multiplies the price, the largest factor first."""
    product = table.rows.iloc[row]
    modalities = list(table.widths)
    is_there = table.valid[row].tolist()
    # a missing modality moves nothing: it stands behind those that do
    order = sorted(range(len(modalities)), key=lambda m: (not is_there[m], -abs(values[m])))
    names = [modalities[m] if is_there[m] else f"{modalities[m]} (missing)" for m in order]
    labels = ["nothing known", *names, "predicted price"]
    ln_steps = nothing + np.concatenate([[0], np.cumsum(values[order])])
    steps = np.exp(ln_steps)  # the price before the first modality and after each
    with figure_at(path, columns=1, width=7.5, height=1.5 + 0.4 * len(labels)) as (figure, (axis,)):
        figure.suptitle(plain_text(f"{product['sample_id']}: {product['entity_name']}", 80), fontsize=10)
        for line, modality in enumerate(order, start=1):
            before = steps[line - 1]
            after = steps[line]
            axis.barh(line, after - before, left=before, color=UP if after > before else DOWN)
            axis.plot([after, after], [line, line + 1], color="grey", linewidth=0.8)
            if is_there[modality]:
                axis.text(
                    max(before, after), line, f"  ×{np.exp(values[modality]):.2f}", va="center", fontsize=9
                )
        for line, price in ((0, steps[0]), (len(labels) - 1, steps[-1])):
            axis.plot(price, line, "o", color="black")
            axis.text(price, line, f"   \\${price:.2f}", va="center", fontsize=9)
        axis.axvline(product["price"], color="black", linestyle="--", linewidth=0.8)
        axis.set(yticks=range(len(labels)), yticklabels=labels)
        axis.set_xlabel(f"price (log scale); dashed: true price, \\${product['price']:.2f}")
        axis.invert_yaxis()
        dollar_axis(axis, min(*steps, product["price"]), max(*steps, product["price"]))


def dollar_axis(axis: Any, low: float, high: float) -> None:
    """A log axis around these prices that says $5 instead of 5 × 10⁰, with room for labels on the right."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    span = np.log(high / low) + 0.5
    subs = (1, 1.5, 2, 3, 5, 7) if span < 3.5 else (1, 3)
    axis.set(xscale="log", xlim=(low * np.exp(-0.1 * span), high * np.exp(0.2 * span)))
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda price, _: f"\\${price:g}"))


def plain_text(text: str, length: int) -> str:
    """`text` as matplotlib shows it unchanged ($ begins a formula there), cut to `length`."""
    text = " ".join(text.split())
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")
