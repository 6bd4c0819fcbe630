"""The products on which a workspace's model is judged, and what the model knew of each.

Everything comes from files: prepared tables, prediction files with their sidecars, and lists of unusable pictures.

Legend: N rows, J members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from contracts.catalog import FEATURE, ColumnMapping, read_table
from contracts.errors import InputError
from contracts.files import read_json
from contracts.predictions import Predictions, prediction_names, read_predictions
from contracts.smape import PRICE_BINS, smape, smape_terms
from contracts.workspace import CLIP_IMAGE, SIGLIP_IMAGE, Workspace
from ensemble.train import COVERAGES, parts_of
from ensemble.weights import difficulty_of, interval_half_width
from pipeline.page.markup import money
from training.pictures import MISSING, NO_LINK

ENSEMBLE = "ensemble"
FUSION = "fusion_all_embeddings"
SHOWN_CATEGORIES = 12
"""The most frequent values of a column that are shown one by one; the others are one group together."""
NOT_STATED = "not stated"
LARGEST_SHARE = 0.5
"""When one price bin holds more than this share of the rows, the usual bins do not suit the catalogue."""


@dataclass
class HeldOut:
    """Products that the model priced without having seen them, N rows."""

    run: str
    rows: pd.DataFrame
    """indexed by sample_id: the prepared columns, fold, predicted (price), smape (term), and picture_problem, which is
    "" for a usable picture"""
    members: pd.DataFrame
    """(N, J) prices of the ensemble's members; J is 0 where the model is no ensemble"""
    intervals: dict[float, pd.DataFrame]
    """for each coverage the columns low, high, inside; calibrated on the other hold-outs; empty without members"""
    currency: str
    reads_pictures: bool
    """whether the catalogue has pictures, and the workspace embeddings of them"""

    @property
    def states_amounts(self) -> bool:
        """Whether amounts are found in this catalogue at all."""
        return bool((self.rows["unit_kind"] != "none").any())


def read_held_out(workspace: Workspace) -> HeldOut | None:
    """The rows that are new to the main run; None where no model has priced any."""
    run = main_run(workspace)
    if run is None:
        return None
    predictions = read_predictions(workspace, run, "train")
    predicted = predictions.by_id[predictions.unseen]
    rows = workspace.training_table().set_index("sample_id").loc[predicted.index]
    rows["predicted"] = predicted
    rows["smape"] = smape_terms(rows["price"].to_numpy(), predicted.to_numpy())
    rows["picture_problem"] = picture_problems(workspace, rows)
    members = read_members(workspace, predictions, rows.index)
    mapping = ColumnMapping.from_json(read_json(workspace.path("catalog")))
    embeddings = [
        workspace.path("embeddings", name=name, split="train") for name in (CLIP_IMAGE, SIGLIP_IMAGE)
    ]
    has_pictures = bool((rows["image"] != "").any())
    return HeldOut(
        run=run,
        rows=rows,
        members=members,
        intervals=nested_intervals(rows, members),
        currency=mapping.currency,
        reads_pictures=has_pictures and any(file.is_file() for file in embeddings),
    )


def main_run(workspace: Workspace) -> str | None:
    """The model that the page is about: the ensemble, else the fusion, else the one with the lowest honest error."""
    scores = {}
    price = workspace.training_table().set_index("sample_id")["price"]
    for name in prediction_names(workspace):
        try:
            predictions = read_predictions(workspace, name, "train")
        except InputError as reason:
            print(f"not shown: {reason}")
            continue
        predicted = predictions.by_id[predictions.unseen]
        if len(predicted):
            scores[name] = smape(price[predicted.index].to_numpy(), predicted.to_numpy())
    for name in (ENSEMBLE, FUSION):
        if name in scores:
            return name
    return min(scores, key=lambda name: scores[name], default=None)


def read_members(workspace: Workspace, ensemble: Predictions, ids: pd.Index) -> pd.DataFrame:
    """(N, J) prices of the models that an ensemble combined, as its sidecar lists them; without columns for others."""
    names = (ensemble.meta or {}).get("members", [])
    prices = pd.DataFrame(index=ids)
    for name in names:
        try:
            predicted = read_predictions(workspace, name, "train").by_id
        except InputError as reason:
            print(f"members are not shown: {reason}")
            return pd.DataFrame(index=ids)
        prices[name] = predicted.reindex(ids)
    # a member that was trained again on fewer rows is no longer the one that was combined
    return prices if prices.notna().all(axis=None) else pd.DataFrame(index=ids)


def nested_intervals(rows: pd.DataFrame, members: pd.DataFrame) -> dict[float, pd.DataFrame]:
    """The interval of each row at each coverage, calibrated on the rows of the other hold-outs.

    Where all rows are of one hold-out, each of its folds is calibrated on its other folds.
    """
    if members.shape[1] == 0:
        return {}
    parts = parts_of(rows["fold"])
    if len(parts) < 2:
        return {}
    ln_price = np.log(rows["price"].to_numpy())
    ln_predicted = np.log(rows["predicted"].to_numpy())
    ln_error = ln_predicted - ln_price
    difficulty = difficulty_of(np.log(members.to_numpy()))
    intervals = {}
    for coverage in COVERAGES:
        half_width = np.empty(len(rows))
        for folds in parts:
            asked = rows["fold"].isin(folds).to_numpy()
            factor = interval_half_width(ln_error[~asked], difficulty[~asked], coverage)
            half_width[asked] = factor * difficulty[asked]
        bounds = {
            "low": np.exp(ln_predicted - half_width),
            "high": np.exp(ln_predicted + half_width),
            "inside": np.abs(ln_error) <= half_width,
        }
        intervals[coverage] = pd.DataFrame(bounds, index=rows.index)
    return intervals


def picture_problems(workspace: Workspace, rows: pd.DataFrame) -> pd.Series:
    """Why a row has no usable picture, "" where it has one: what the encoders reported, or that there is no file."""
    folder = workspace.images_folder()
    reasons = []
    for name in rows["image"]:
        if not name:
            reasons.append(NO_LINK)
        else:
            reasons.append("" if (folder / name).is_file() else MISSING)
    problems = pd.Series(reasons, rows.index, dtype=str)
    failures = workspace.path("image_failures", name="any", split="train").parent
    for path in sorted(failures.glob("image_failures_*_train.csv")):
        table = read_table(path)
        table["sample_id"] = table["sample_id"].str.replace(r"^'(?=[=+\-@\t\r])", "", regex=True)
        found = table.set_index("sample_id")["reason"]
        known = problems.index.intersection(found.index)
        problems[known] = found[known]
    return problems


# Groupings of the rows: a label for each row, and the labels in the order in which they are shown.


def price_groups(price: np.ndarray, currency: str) -> pd.Categorical:
    """The price bin of each row, labelled "under $5", "$5 to $10", …, "$200 and more"."""
    edges = np.array(PRICE_BINS[1:-1])
    counts = np.histogram(price, bins=[0.0, *edges, np.inf])[0]
    if counts.max() > LARGEST_SHARE * len(price):
        # prices in yen, or of furniture: five bins of equal size, at edges of two significant digits
        quantiles = np.quantile(price, [0.2, 0.4, 0.6, 0.8])
        edges = np.unique([float(f"{edge:.2g}") for edge in quantiles])
    written = [money(edge, currency, whole=True) for edge in edges]
    between = [f"{low} to {high}" for low, high in zip(written[:-1], written[1:], strict=True)]
    labels = [f"under {written[0]}", *between, f"{written[-1]} and more"]
    return pd.Categorical.from_codes(np.searchsorted(edges, price, side="right"), labels, ordered=True)


def category_groups(values: pd.Series) -> pd.Categorical:
    """The value of each row, the most frequent first; rare values share one group, empty ones are "not stated".

    A value that only one row has is rare: its error has no standard error.
    """
    values = values.astype(str).str.strip()
    values = values.mask(values == "", NOT_STATED)
    counts = values[values != NOT_STATED].value_counts()
    # sorted by name within a count, so that the page does not depend on the order of the rows
    names = sorted(counts.index, key=lambda name: (-counts[name], name))
    shown = [name for name in names if counts[name] > 1][:SHOWN_CATEGORIES]
    rare = len(names) - len(shown)
    others = f"{rare} others" if rare > 1 else "another one"
    labels = [*shown, others, NOT_STATED]
    return pd.Categorical(
        values.where(values.isin([*shown, NOT_STATED]), others), list(dict.fromkeys(labels))
    )


def groupings(held_out: HeldOut, features: Mapping[str, str | None]) -> dict[str, pd.Categorical]:
    """Every grouping of the rows that the page shows errors by; one that has a single group is left out.

    Args:
        features: kind of each further column, from data/catalog.json.
    """
    rows = held_out.rows
    found = {
        "price": price_groups(rows["price"].to_numpy(), held_out.currency),
        "unit kind": category_groups(rows["unit_kind"].replace("none", NOT_STATED)),
    }
    for name, kind in features.items():
        if kind == "category" and FEATURE + name in rows:
            found[name] = category_groups(rows[FEATURE + name])
    if held_out.reads_pictures:
        has_picture = rows["picture_problem"] == ""
        labels = np.where(has_picture, "usable picture", "no usable picture")
        found["picture"] = pd.Categorical(labels, ["usable picture", "no usable picture"])
    return {
        name: groups
        for name, groups in found.items()
        if len(groups.remove_unused_categories().categories) > 1
    }


def by_group(values: pd.Series, groups: pd.Categorical) -> pd.DataFrame:
    """Mean of `values` in each group, in the order of the groups: columns value, error (standard error), rows."""
    grouped = pd.Series(values.to_numpy(np.float64)).groupby(groups, observed=True)
    return pd.DataFrame({"value": grouped.mean(), "error": grouped.sem(), "rows": grouped.size()})
