"""What every word and field adds to the price of a product, for the sparse MLP of `word_models.sparse_mlp`.

Legend: n explained rows, N catalogue rows, V terms, S structural features, D dimensions of all views of meaning.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sparse

from contracts.errors import InputError
from contracts.splits import N_HOLDOUTS, roles
from contracts.workspace import Workspace
from word_models.config import WordModelSettings
from word_models.features import (
    TERM_GROUPS,
    WORD,
    FeatureBuilder,
    Features,
    TermNames,
    structural_fields,
    with_meanings,
)
from word_models.meanings import VIEWS

if TYPE_CHECKING:
    from word_models.sparse_mlp import FittedMlp

STEPS = 256  # of the path; on 500 real rows the sums then miss ln price by 0.0004 on average, 0.002 at most
LENGTHS = ("text length", "title length")
WORD_GROUPS = ("title words", "text words", "title pieces")
LEAST_OCCURRENCES = 20
UNITS = {"weight": " g", "volume": " ml", "count": "", "length": " m", "none": ""}


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
        features = dict(zip(tables, with_meanings(builder, **tables), strict=True))
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
    meanings: np.ndarray
    """(n, 3), one column a view"""
    baseline: float
    """ln price of a product without any term and with the mean of all else"""
    predicted: np.ndarray
    """(n,) ln price"""


def integrated_gradients(network: FittedMlp, features: Features, baseline: np.ndarray) -> Attribution:
    """Attribute ln price by integrated gradients from no terms and `Features.dense` at `baseline` (S + D,).

        IG_i = (x_i − x'_i) ∫₀¹ ∂f/∂x_i (x' + α (x − x')) dα

    Sundararajan et al. 2017, "Axiomatic attribution for deep networks", equation 1, by the midpoint rule. The first
    layer's sum z is linear in x, so ∂f/∂x_i = W_i · ∂f/∂z, and the path is walked once a row in the width of z
    rather than once a term.
    """
    import torch

    from word_models.sparse_mlp import as_tensors

    mlp, counts = network.network, np.diff(features.terms.indptr)
    indices, offsets, values, dense = as_tensors(features)
    with torch.no_grad():
        start = mlp.structural(torch.from_numpy(baseline)[None])  # (1, hidden)
        moved = mlp.terms(indices, offsets, per_sample_weights=values) + mlp.structural(dense) - start
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
        by_column = (dense - torch.from_numpy(baseline)) * (gradient @ mlp.structural.weight)
    matrix = sparse.csr_matrix((terms, features.terms.indices, features.terms.indptr), features.terms.shape)
    widths = [features.structural.shape[1], *(view.shape[1] for view in features.meanings)]
    structural, *views = np.split(by_column.double().numpy(), np.cumsum(widths)[:-1], axis=1)
    meanings = np.stack([view.sum(axis=1) for view in views], axis=1)
    return Attribution(matrix, structural, meanings, float(ends[0][0]), ends[1])


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
    """(S + D,) mean of the fitted rows' `Features.dense`"""

    @classmethod
    def fit(cls, settings: WordModelSettings, catalogue: Catalogue, holdout: int | None) -> Explainer:
        """Fit on the rows outside the hold-out; None fits on all rows, to explain test rows."""
        from word_models.sparse_mlp import fit_mlp

        held_out = catalogue.held_out(holdout)
        known = catalogue.features["train"][~held_out]
        ln_price = np.log(catalogue.tables["train"]["price"].to_numpy()[~held_out])
        seeds = range(settings.seed, settings.seed + settings.seeds)
        networks = [fit_mlp(settings, known, ln_price, seed) for seed in seeds]
        split = "test" if holdout is None else "train"
        rows = np.arange(len(catalogue.tables["test"])) if holdout is None else np.flatnonzero(held_out)
        return cls(catalogue, split, rows, networks, known.dense.mean(axis=0))

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
                    np.mean([part.meanings for part in each], axis=0),
                    float(np.mean([part.baseline for part in each])),
                    np.mean([part.predicted for part in each], axis=0),
                )
            )
        return Attribution(
            sparse.vstack([part.terms for part in parts], format="csr"),
            np.concatenate([part.structural for part in parts]),
            np.concatenate([part.meanings for part in parts]),
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

    Groups are those of the terms, "meanings", "amounts" and "lengths"; title pieces are given to the words they come
    from.
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
    views = pd.DataFrame({"label": VIEWS, "contribution": attribution.meanings[row]}).assign(group="meanings")
    columns = ["label", "group", "contribution"]
    parts = [part[columns] for part in (frame[~is_piece], words, fields, views) if len(part)]
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
    net["meanings"] = attribution.meanings.sum(axis=1)
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
