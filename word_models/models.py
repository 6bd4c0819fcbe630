"""One function a model: fit on some rows, predict others. All speak natural-log price.

Legend: n rows to fit, m rows to predict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sparse

from word_models.config import WordModelSettings
from word_models.features import Features

if TYPE_CHECKING:
    from word_models.kernel import Estimate

OMP_THREADS = (
    0  # LightGBM's word for as many as OpenMP may use; its default takes every core, whoever else is there
)

FitPredict = Callable[[WordModelSettings, Features, np.ndarray, Features], np.ndarray]


def ridge(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    from sklearn.linear_model import Ridge

    def columns(features: Features) -> sparse.csr_matrix:
        return sparse.hstack([features.terms, sparse.csr_matrix(features.dense * 0.3)], format="csr")

    return Ridge(alpha=2.0, solver="sparse_cg", tol=1e-4).fit(columns(fit), ln_price).predict(columns(apply))


def kernel(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    return kernel_estimates(settings, fit, ln_price, apply)[1].ln_price


def kernel_estimates(
    settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features
) -> tuple[Estimate, Estimate]:
    """The kernel's estimates of each fitted row by all other fitted rows, and of the rows asked for by all fitted ones.

    So a second model may learn from the first one's errors on the rows that both are fitted on.
    """
    from word_models.kernel import KernelModel

    model = KernelModel.fit(settings, fit, ln_price)
    return model.left_out, model.estimate(apply)


def boosted(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    """Kernel, then trees on its errors."""
    import lightgbm as lgb

    def columns(features: Features, by_kernel: Estimate) -> np.ndarray:
        return np.column_stack([by_kernel.ln_price, by_kernel.surroundings, features.structural])

    left_out, predicted = kernel_estimates(settings, fit, ln_price, apply)
    correction = np.zeros(len(predicted.ln_price))
    for seed in range(settings.seed, settings.seed + settings.seeds):
        trees = lgb.LGBMRegressor(
            objective="regression_l1", n_estimators=settings.trees, learning_rate=0.02, num_leaves=12,
            min_child_samples=40, colsample_bytree=0.2, subsample=0.7, subsample_freq=1, reg_lambda=5.0,
            random_state=seed, n_jobs=OMP_THREADS, verbose=-1,
        )  # fmt: skip
        trees.fit(columns(fit, left_out), ln_price - left_out.ln_price)
        correction += trees.predict(columns(apply, predicted)) / settings.seeds
    return predicted.ln_price + correction


def mlp_on_kernel(
    settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features
) -> np.ndarray:
    """The network with the kernel's price and the surroundings as more columns; the price twice as strong as others."""
    left_out, predicted = kernel_estimates(settings, fit, ln_price, apply)
    mean, deviation = left_out.surroundings.mean(axis=0), left_out.surroundings.std(axis=0) + 1e-6

    def with_estimate(features: Features, by_kernel: Estimate) -> Features:
        price = 2 * (by_kernel.ln_price - ln_price.mean()) / ln_price.std()
        columns = [features.structural, price, (by_kernel.surroundings - mean) / deviation]
        return replace(features, structural=np.column_stack(columns).astype(np.float32))

    return mlp(settings, with_estimate(fit, left_out), ln_price, with_estimate(apply, predicted))


def neighbours(
    settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features
) -> np.ndarray:
    """Mean ln price of the 20 most similar products, weighted by a power of their cosine similarity."""
    return neighbour_features(fit, ln_price, apply)[:, 0]


def neighbour_features(
    fit: Features, ln_price: np.ndarray, apply: Features, *, skip_self: bool = False
) -> np.ndarray:
    """[weighted mean, nearest price, nearest similarity] of the 20 nearest, (m, 3).

    `skip_self` is for rows that are their own neighbours: what a fitted row sees must not contain its own price.
    """
    from sklearn.preprocessing import normalize

    first, count = int(skip_self), 20
    known, asked = normalize(fit.terms), normalize(apply.terms)
    found = np.empty((asked.shape[0], 3))
    for start in range(0, asked.shape[0], 512):
        similarity = (asked[start : start + 512] @ known.T).toarray()
        if skip_self:
            similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))] = (
                2.0  # sorts first
            )
        nearest = np.argpartition(-similarity, count, axis=1)[:, : count + first]
        nearest = np.take_along_axis(
            nearest, np.argsort(-np.take_along_axis(similarity, nearest, 1), axis=1), 1
        )[:, first:]
        near = np.take_along_axis(similarity, nearest, axis=1)
        weight = near**4 + 1e-9
        mean = (weight * ln_price[nearest]).sum(axis=1) / weight.sum(axis=1)
        found[start : start + 512] = np.stack([mean, ln_price[nearest[:, 0]], near[:, 0]], axis=1)
    return found


def lightgbm(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    """Gradient boosting on an SVD of terms and meanings, amounts and the prices of similar products; each seed draws
    its own columns."""
    import lightgbm as lgb
    from sklearn.decomposition import TruncatedSVD

    def content(features: Features) -> sparse.csr_matrix:
        return sparse.hstack([features.terms, *map(sparse.csr_matrix, features.meanings)], format="csr")

    svd = TruncatedSVD(settings.svd, random_state=settings.seed).fit(content(fit))

    def columns(features: Features, skip_self: bool) -> np.ndarray:
        similar = neighbour_features(fit, ln_price, features, skip_self=skip_self)
        return np.hstack([svd.transform(content(features)), features.structural, similar])

    fit_columns, apply_columns = columns(fit, True), columns(apply, False)
    predictions = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        model = lgb.LGBMRegressor(
            objective="regression_l1", n_estimators=settings.trees, learning_rate=0.03, num_leaves=31,
            min_child_samples=20, colsample_bytree=0.3, subsample=0.8, subsample_freq=1, reg_lambda=1.0,
            random_state=seed, n_jobs=OMP_THREADS, verbose=-1,
        )  # fmt: skip
        predictions.append(model.fit(fit_columns, ln_price).predict(apply_columns))
    return np.mean(predictions, axis=0)


def mlp(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    from word_models.sparse_mlp import fit_predict

    seeds = range(settings.seed, settings.seed + settings.seeds)
    return np.mean([fit_predict(settings, fit, ln_price, apply, seed) for seed in seeds], axis=0)


MODELS: dict[str, FitPredict] = {
    "ridge": ridge, "kernel": kernel, "boosted": boosted, "lightgbm": lightgbm, "neighbours": neighbours,
    "mlp": mlp, "mlp_on_kernel": mlp_on_kernel, "mlp_distribution": mlp,
}  # fmt: skip
