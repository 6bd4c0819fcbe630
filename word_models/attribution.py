"""What every term and column adds to ln price, for the sparse MLP of `word_models.sparse_mlp`.

Legend: n explained rows, N catalogue rows, V terms, S structural columns, D dimensions of all views of meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sparse

from contracts.errors import InputError
from contracts.splits import N_HOLDOUTS, roles
from contracts.workspace import Workspace
from word_models.config import MlpSettings
from word_models.facts import fact_kinds
from word_models.features import FeatureBuilder, Features, TermNames

if TYPE_CHECKING:
    from torch import Tensor

    from word_models.sparse_mlp import FittedMlp

STEPS = 256
"""Points on the path of the integral. With so many the contributions of 500 real rows miss the change of ln price by
0.0004 on average and by 0.002 at most."""
ROWS_AT_ONCE = 256
"""Rows that are explained together. The number bounds memory: the gradient of every term that occurs is held."""


@dataclass
class Catalogue:
    """The prepared tables with their features, in the same order."""

    tables: dict[str, pd.DataFrame]
    """"train", which has a column `fold`, and "test", which has no rows where the catalogue has no test table"""
    features: dict[str, Features]
    builder: FeatureBuilder
    names: TermNames

    @classmethod
    def read(cls, workspace: Workspace) -> Catalogue:
        train = workspace.training_table()
        has_test = workspace.path("prepared", split="test").is_file()
        test = workspace.prepared("test") if has_test else train.iloc[:0]
        tables = {"train": train, "test": test}
        builder = FeatureBuilder.fit(train, [test], facts=fact_kinds(workspace))
        features = {"train": builder(train)}
        if has_test:
            features["test"] = builder(test)
        return cls(tables, features, builder, builder.term_names())

    @property
    def columns(self) -> dict[str, slice]:
        """The structural columns by name."""
        return self.features["train"].columns

    def held_out(self, holdout: int | None) -> np.ndarray:
        """(N,) bool: the training rows of a hold-out. For None, no row."""
        return self.tables["train"]["fold"].isin(roles(holdout).validate).to_numpy()

    def find(self, sample_id: str) -> tuple[int | None, int]:
        """Hold-out (None for a test row) and position of a product. Raises InputError for an unknown id."""
        train_rows = np.flatnonzero(self.tables["train"]["sample_id"] == sample_id)
        test_rows = np.flatnonzero(self.tables["test"]["sample_id"] == sample_id)
        if len(train_rows):
            row = train_rows[0]
            return next(holdout for holdout in range(N_HOLDOUTS) if self.held_out(holdout)[row]), row
        if len(test_rows):
            return None, test_rows[0]
        raise InputError(f"--ids {sample_id}: neither in prepared_train.csv nor in prepared_test.csv")


@dataclass
class Attribution:
    """What moves ln price from the baseline to the prediction of n rows; all contributions of a row sum to that."""

    terms: sparse.csr_matrix
    """(n, V)"""
    structural: np.ndarray
    """(n, S)"""
    meanings: np.ndarray
    """(n, 3), one column per view"""
    baseline: float
    """ln price of a product without any term and with the mean of all else"""
    predicted: np.ndarray
    """(n,) ln price"""

    @classmethod
    def mean(cls, parts: list[Attribution]) -> Attribution:
        """Of several networks on the same rows: it explains the mean of their ln prices."""
        return cls(
            terms=sum(part.terms for part in parts) / len(parts),
            structural=np.mean([part.structural for part in parts], axis=0),
            meanings=np.mean([part.meanings for part in parts], axis=0),
            baseline=float(np.mean([part.baseline for part in parts])),
            predicted=np.mean([part.predicted for part in parts], axis=0),
        )

    @classmethod
    def concatenate(cls, parts: list[Attribution]) -> Attribution:
        """Of the same networks on one batch of rows after another."""
        return cls(
            terms=sparse.vstack([part.terms for part in parts], format="csr"),
            structural=np.concatenate([part.structural for part in parts]),
            meanings=np.concatenate([part.meanings for part in parts]),
            baseline=parts[0].baseline,
            predicted=np.concatenate([part.predicted for part in parts]),
        )


def integrated_gradients(network: FittedMlp, features: Features, baseline: np.ndarray) -> Attribution:
    """Attribute ln price by integrated gradients from no terms and `Features.dense` at `baseline` (S + D,).

        IG_i = (x_i − x'_i) ∫₀¹ ∂f/∂x_i (x' + α (x − x')) dα

    Sundararajan et al. 2017, "Axiomatic attribution for deep networks", equation 1, by the midpoint rule. The first
    layer's sum z is linear in x, so ∂f/∂x_i = W_i · ∂f/∂z. The path is therefore walked in the width of z, once per
    row, rather than once per term.
    """
    import torch

    from word_models.sparse_mlp import as_tensors

    mlp = network.network
    indices, offsets, values, dense = as_tensors(features)
    dense_baseline = torch.from_numpy(baseline)
    with torch.no_grad():
        z_start = mlp.dense(dense_baseline[None])  # (1, hidden)
        z_change = mlp.first_layer(indices, offsets, values, dense) - z_start  # (n, hidden)
        start = _ln_price(network, z_start)
        predicted = _ln_price(network, z_start + z_change)
    by_z = _mean_gradient(network, z_start, z_change)

    with torch.no_grad():
        # one gradient per entry of the sparse matrix, never a dense (n, V)
        terms_per_row = torch.from_numpy(np.diff(features.terms.indptr))
        by_value = (mlp.terms.weight[indices] * by_z.repeat_interleave(terms_per_row, dim=0)).sum(dim=1)
        of_terms = (values * by_value).double().numpy()  # (entries,); x' is 0 for terms
        of_dense = ((dense - dense_baseline) * (by_z @ mlp.dense.weight)).double().numpy()  # (n, S + D)
    terms = sparse.csr_matrix((of_terms, features.terms.indices, features.terms.indptr), features.terms.shape)

    # `Features.dense` holds the structural columns first, then one view after another
    width = features.structural.shape[1]
    structural = of_dense[:, :width]
    meanings = []
    for view in features.meanings:
        meanings.append(of_dense[:, width : width + view.shape[1]].sum(axis=1))
        width += view.shape[1]
    return Attribution(terms, structural, np.stack(meanings, axis=1), float(start[0]), predicted)


def _ln_price(network: FittedMlp, z: Tensor) -> np.ndarray:
    """(n, hidden) sums of the first layer → (n,) ln price."""
    return network.network.layers(z)[:, 0].double().numpy() * network.scale + network.mean


def _mean_gradient(network: FittedMlp, start: Tensor, change: Tensor) -> Tensor:
    """Mean gradient of ln price on the way from z = start (1, hidden) to start + change (n, hidden), (n, hidden)."""
    import torch

    gradient = torch.zeros_like(change)
    for step in range(STEPS):
        # the midpoint of each of STEPS equal parts of the path
        z = (start + (step + 0.5) / STEPS * change).requires_grad_()
        # rows do not meet in the layers, so the gradient of the sum holds each row's own gradient
        (by_z,) = torch.autograd.grad(network.network.layers(z).sum(), z)
        gradient += by_z * (network.scale / STEPS)
    return gradient


@dataclass
class Explainer:
    """Networks that have not seen the rows they explain."""

    catalogue: Catalogue
    split: str
    rows: np.ndarray
    """positions in the split's table that may be explained"""
    networks: list[FittedMlp]
    """the mean of their ln prices is explained"""
    baseline: np.ndarray
    """(S + D,) mean of the fitted rows' `Features.dense`"""

    @classmethod
    def fit(cls, settings: MlpSettings, catalogue: Catalogue, holdout: int | None) -> Explainer:
        """Networks fitted on the rows outside the hold-out; for None on all training rows, to explain test rows."""
        from word_models.sparse_mlp import fit_mlp

        held_out = catalogue.held_out(holdout)
        fit = catalogue.features["train"][~held_out]
        ln_price = np.log(catalogue.tables["train"]["price"].to_numpy()[~held_out])
        seeds = range(settings.seed, settings.seed + settings.seeds)
        networks = [fit_mlp(settings, fit, ln_price, seed) for seed in seeds]
        # views of meaning are nearly centred, so the mean stands for "no particular meaning"
        baseline = fit.dense.mean(axis=0)
        if holdout is None:
            return cls(catalogue, "test", np.arange(len(catalogue.tables["test"])), networks, baseline)
        return cls(catalogue, "train", np.flatnonzero(held_out), networks, baseline)

    def table(self, rows: np.ndarray) -> pd.DataFrame:
        """The prepared rows at these positions."""
        return self.catalogue.tables[self.split].iloc[rows]

    def spread(self, count: int) -> np.ndarray:
        """Positions of `count` rows, evenly from the cheapest to the most expensive prediction."""
        features = self.catalogue.features[self.split][self.rows]
        predicted = np.mean([network.predict(features) for network in self.networks], axis=0)
        by_price = np.argsort(predicted, kind="stable")
        # the middles of `count` equal parts
        ranks = (np.arange(count) + 0.5) / max(count, 1) * len(predicted)
        return self.rows[np.unique(by_price[ranks.astype(int)])]

    def attribute(self, rows: np.ndarray) -> Attribution:
        """Integrated gradients of the networks' mean for the rows at these positions."""
        parts = []
        for batch in np.split(rows, range(ROWS_AT_ONCE, len(rows), ROWS_AT_ONCE)):
            features = self.catalogue.features[self.split][batch]
            by_network = [integrated_gradients(network, features, self.baseline) for network in self.networks]
            parts.append(Attribution.mean(by_network))
        return Attribution.concatenate(parts)
