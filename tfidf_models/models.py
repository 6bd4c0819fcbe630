"""One function a model: fit on some rows, predict others. All speak natural-log price.

Legend: n rows to fit, m rows to predict.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sparse

from contracts.errors import InputError
from tfidf_models.config import TfidfSettings
from tfidf_models.features import Features

LARGEST_KERNEL = 30_000  # rows: 3.6 GB a matrix, and several of them

FitPredict = Callable[[TfidfSettings, Features, np.ndarray, Features], np.ndarray]


def ridge(settings: TfidfSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    from sklearn.linear_model import Ridge

    def columns(features: Features) -> sparse.csr_matrix:
        return sparse.hstack([features.terms, sparse.csr_matrix(features.dense * 0.3)], format="csr")

    return Ridge(alpha=2.0, solver="sparse_cg", tol=1e-4).fit(columns(fit), ln_price).predict(columns(apply))


def kernel(settings: TfidfSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    """Kernel ridge regression: what similar texts of similar amounts cost, all training rows at once.

        k(i, j) = (0.6 + 0.4 exp(−|a_i − a_j|²/2)) · (exp((cos t − 1)/1.5) + 0.3 exp((cos e − 1)/0.5))

    with standardised log amounts a, term vectors t and, with --embeddings, embeddings e. Memory grows with n².
    """
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.preprocessing import normalize

    if fit.terms.shape[0] > LARGEST_KERNEL:
        raise InputError(
            f"--model kernel: {fit.terms.shape[0]} rows, it holds at most {LARGEST_KERNEL} in memory"
        )

    def similarity(asked: Features) -> np.ndarray:
        terms = (normalize(asked.terms) @ normalize(fit.terms).T).toarray()
        similar = np.exp((terms - 1) / 1.5, out=terms)
        if fit.embedding.shape[1]:
            cosine = normalize(asked.embedding) @ normalize(fit.embedding).T
            similar += 0.3 * np.exp((cosine - 1) / 0.5, out=cosine)
        return similar * (0.6 + 0.4 * rbf_kernel(asked.structural[:, :3], fit.structural[:, :3], gamma=0.5))

    mean = ln_price.mean()
    model = KernelRidge(alpha=0.05, kernel="precomputed").fit(similarity(fit), ln_price - mean)
    return mean + np.concatenate(
        [
            model.predict(similarity(apply[np.arange(start, min(start + 2048, len(apply.structural)))]))
            for start in range(0, len(apply.structural), 2048)
        ]
    )


def neighbours(settings: TfidfSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
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


def lightgbm(settings: TfidfSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    """Gradient boosting on SVD, amounts and the prices of similar products; each seed draws its own columns."""
    import lightgbm as lgb
    from sklearn.decomposition import TruncatedSVD

    svd = TruncatedSVD(settings.svd, random_state=settings.seed).fit(fit.terms)

    def columns(features: Features, skip_self: bool) -> np.ndarray:
        similar = neighbour_features(fit, ln_price, features, skip_self=skip_self)
        return np.hstack([svd.transform(features.terms), features.dense, similar])

    fit_columns, apply_columns = columns(fit, True), columns(apply, False)
    predictions = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        model = lgb.LGBMRegressor(
            objective="regression_l1", n_estimators=settings.trees, learning_rate=0.03, num_leaves=31,
            min_child_samples=20, colsample_bytree=0.3, subsample=0.8, subsample_freq=1, reg_lambda=1.0,
            random_state=seed, verbose=-1,
        )  # fmt: skip
        predictions.append(model.fit(fit_columns, ln_price).predict(apply_columns))
    return np.mean(predictions, axis=0)


def mlp(settings: TfidfSettings, fit: Features, ln_price: np.ndarray, apply: Features) -> np.ndarray:
    from tfidf_models.sparse_mlp import fit_predict

    seeds = range(settings.seed, settings.seed + settings.seeds)
    return np.mean([fit_predict(settings, fit, ln_price, apply, seed) for seed in seeds], axis=0)


MODELS: dict[str, FitPredict] = {
    "ridge": ridge, "kernel": kernel, "lightgbm": lightgbm, "neighbours": neighbours,
    "mlp": mlp, "mlp_distribution": mlp,
}  # fmt: skip
