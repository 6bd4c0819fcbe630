"""One function per model: fit it on some rows, predict others. All prices are natural logarithms (ln price).

Legend: n rows to fit, m rows to predict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sparse

from word_models.config import WordModelSettings
from word_models.features import MIN_DEVIATION, Features

if TYPE_CHECKING:
    from word_models.kernel import Estimate

FitPredict = Callable[[WordModelSettings, Features, np.ndarray, Features], np.ndarray]
"""(settings, n rows to fit, their ln price (n,), m rows to predict) → ln price (m,)"""

RIDGE_PENALTY = 2.0
RIDGE_DENSE_STRENGTH = 0.3
"""The one penalty acts on all columns. Without this factor it would hardly touch amounts and meanings, whose values are
larger than TF-IDF weights."""
RIDGE_TOLERANCE = 1e-4
"""Relative error at which the iterative solver stops; it is far below the noise of prices."""

NEIGHBOURS = 20
NEIGHBOUR_POWER = 4
"""A neighbour's weight is its similarity to this power: near ones count far more than the twentieth."""
NEIGHBOUR_MIN_WEIGHT = 1e-9
"""Weight of a neighbour without a common term. If all are such, their plain mean is the answer."""
ROWS_AT_ONCE = 512
"""Asked rows that are compared together with all fitted rows. The number bounds memory."""

TREES = {
    # the absolute error: for small errors SMAPE is about 100·|ln p − ln a|
    "objective": "regression_l1",
    # draw the rows of `subsample` anew for each tree; at 0, the default, LightGBM ignores `subsample`
    "subsample_freq": 1,
    # 0 obeys OMP_NUM_THREADS; the default takes every core, whatever else runs there
    "n_jobs": 0,
    "verbose": -1,
}
"""What all LightGBM models have in common."""
PRICE_TREES = TREES | {
    "learning_rate": 0.03,
    "num_leaves": 31,
    "min_child_samples": 20,
    "colsample_bytree": 0.3,
    "subsample": 0.8,
    "reg_lambda": 1.0,
}
CORRECTION_TREES = TREES | {
    "learning_rate": 0.02,
    "num_leaves": 12,
    "min_child_samples": 40,
    "colsample_bytree": 0.2,
    "subsample": 0.7,
    "reg_lambda": 5.0,
}
"""Smaller and more strongly regularised than PRICE_TREES: most of the error that the kernel leaves is noise."""

KERNEL_PRICE_STRENGTH = 2
"""Standard deviation of the kernel's price as an input of the MLP. The other inputs have 1; none says as much as it."""


def ridge(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    """Ridge regression on terms, amounts and meanings."""
    from sklearn.linear_model import Ridge

    def columns(features: Features) -> sparse.csr_matrix:
        dense = sparse.csr_matrix(features.dense * RIDGE_DENSE_STRENGTH)
        return sparse.hstack([features.terms, dense], format="csr")

    model = Ridge(alpha=RIDGE_PENALTY, solver="sparse_cg", tol=RIDGE_TOLERANCE)
    return model.fit(columns(fit), ln_price).predict(columns(apply))


def kernel(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    """Kernel ridge regression with a learned similarity (`word_models.kernel`)."""
    _, predicted = kernel_estimates(settings, fit, ln_price, apply)
    return predicted.ln_price


def kernel_estimates(
    settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features
) -> tuple[Estimate, Estimate]:
    """The kernel's estimates of each fitted row by all other fitted rows, and of the rows to predict by all of them.

    The former let a second model learn from the kernel's errors on the very rows that both are fitted on.
    """
    from word_models.kernel import KernelModel

    model = KernelModel.fit(settings, fit, ln_price)
    return model.left_out, model.estimate(apply)


def boosted(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    """The kernel's price, corrected by trees that are fitted to its leave-one-out errors."""

    def columns(features: Features, by_kernel: Estimate) -> np.ndarray:
        return np.column_stack([by_kernel.ln_price, by_kernel.surroundings, features.structural])

    left_out, predicted = kernel_estimates(settings, fit, ln_price, apply)
    error = ln_price - left_out.ln_price  # (n,)
    correction = mean_of_trees(
        settings, columns(fit, left_out), error, columns(apply, predicted), CORRECTION_TREES
    )
    return predicted.ln_price + correction


def mean_of_trees(
    settings: WordModelSettings,
    fit_columns: np.ndarray,
    target: np.ndarray,
    apply_columns: np.ndarray,
    options: dict[str, object],
) -> np.ndarray:
    """Mean prediction (m,) of one LightGBM model per seed, fitted on columns (n, ·) and target (n,)."""
    import lightgbm as lgb

    predictions = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        model = lgb.LGBMRegressor(n_estimators=settings.trees, random_state=seed, **options)
        predictions.append(model.fit(fit_columns, target).predict(apply_columns))
    return np.mean(predictions, axis=0)


def mlp_on_kernel(
    settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features
) -> np.ndarray:
    """The sparse MLP with the kernel's price and its surroundings as further columns."""
    left_out, predicted = kernel_estimates(settings, fit, ln_price, apply)
    # standardised on the fitted rows, as all other columns are
    mean = left_out.surroundings.mean(axis=0)
    deviation = left_out.surroundings.std(axis=0) + MIN_DEVIATION

    def with_estimate(features: Features, by_kernel: Estimate) -> Features:
        price = KERNEL_PRICE_STRENGTH * (by_kernel.ln_price - ln_price.mean()) / ln_price.std()
        around = (by_kernel.surroundings - mean) / deviation
        return features.with_columns({"kernel_price": price[:, None], "kernel_surroundings": around})

    return mlp(settings, with_estimate(fit, left_out), ln_price, with_estimate(apply, predicted))


class NeighbourPrices(NamedTuple):
    """What the NEIGHBOURS most similar fitted rows say of m rows, (m,) each."""

    mean: np.ndarray
    """ln price, weighted by a power of the similarity"""
    nearest: np.ndarray
    """ln price of the most similar row"""
    similarity: np.ndarray
    """cosine of the most similar row"""


def neighbours(
    settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features
) -> np.ndarray:
    """Weighted mean ln price of the most similar products."""
    return neighbour_prices(fit, ln_price, apply).mean


def neighbour_prices(
    fit: Features, ln_price: np.ndarray, apply: Features, *, skip_self: bool = False
) -> NeighbourPrices:
    """The prices of the most similar fitted rows by the cosine of all terms.

    `skip_self`: the rows to predict are the fitted ones, and none may see its own price.
    """
    from sklearn.preprocessing import normalize

    known = normalize(fit.terms)
    asked = normalize(apply.terms)
    parts = []
    for start in range(0, len(apply), ROWS_AT_ONCE):
        similarity = (asked[start : start + ROWS_AT_ONCE] @ known.T).toarray()  # (rows, n)
        if skip_self:
            rows = np.arange(len(similarity))
            similarity[rows, start + rows] = 2.0  # above any cosine, so that the row itself is the first
            nearest = _most_similar(similarity, NEIGHBOURS + 1)[:, 1:]
        else:
            nearest = _most_similar(similarity, NEIGHBOURS)
        near = np.take_along_axis(similarity, nearest, axis=1)  # (rows, NEIGHBOURS)
        price = ln_price[nearest]  # (rows, NEIGHBOURS)
        weight = near**NEIGHBOUR_POWER + NEIGHBOUR_MIN_WEIGHT
        mean = (weight * price).sum(axis=1) / weight.sum(axis=1)
        parts.append(NeighbourPrices(mean, price[:, 0], near[:, 0]))
    return NeighbourPrices(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _most_similar(similarity: np.ndarray, count: int) -> np.ndarray:
    """(rows, n) → (rows, count) positions of the highest values, in falling order; count is at most NEIGHBOURS + 1."""
    # sorting only what a partition leaves takes a fraction of the time of sorting all
    found = np.argpartition(-similarity, NEIGHBOURS, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(similarity, found, axis=1), axis=1)
    return np.take_along_axis(found, order, axis=1)


def lightgbm(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    """Trees on an SVD of terms and meanings, on amounts and on the prices of similar products."""
    from sklearn.decomposition import TruncatedSVD

    def content(features: Features) -> sparse.csr_matrix:
        views = [sparse.csr_matrix(view) for view in features.meanings]
        return sparse.hstack([features.terms, *views], format="csr")

    svd = TruncatedSVD(settings.svd, random_state=settings.seed).fit(content(fit))

    def columns(features: Features, *, skip_self: bool) -> np.ndarray:
        similar = np.column_stack(neighbour_prices(fit, ln_price, features, skip_self=skip_self))
        return np.hstack([svd.transform(content(features)), features.structural, similar])

    fit_columns = columns(fit, skip_self=True)
    apply_columns = columns(apply, skip_self=False)
    return mean_of_trees(settings, fit_columns, ln_price, apply_columns, PRICE_TREES)


def mlp(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    """Mean of one sparse MLP per seed (`word_models.sparse_mlp`)."""
    return _mean_of_mlps(settings, fit, ln_price, apply, bins=None)


def mlp_distribution(
    settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features
) -> np.ndarray:
    """The sparse MLP over bins of ln price, read at the lowest expected SMAPE."""
    return _mean_of_mlps(settings, fit, ln_price, apply, bins=settings.bins)


def _mean_of_mlps(
    settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features, *, bins: int | None
) -> np.ndarray:
    from word_models.sparse_mlp import fit_mlp

    predictions = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        predictions.append(fit_mlp(settings, fit, ln_price, seed, bins=bins).predict(apply))
    return np.mean(predictions, axis=0)


MODELS: dict[str, FitPredict] = {
    "ridge": ridge,
    "kernel": kernel,
    "boosted": boosted,
    "lightgbm": lightgbm,
    "neighbours": neighbours,
    "mlp": mlp,
    "mlp_on_kernel": mlp_on_kernel,
    "mlp_distribution": mlp_distribution,
}
