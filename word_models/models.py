"""The models: each is fitted on some rows, prices others, and can be saved. All prices are natural logarithms.

Legend: n rows to fit, m rows to predict, V terms, S + D dense columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import scipy.sparse as sparse

from word_models.config import WordModelSettings
from word_models.features import MIN_DEVIATION, Features
from word_models.neighbours import Neighbours
from word_models.trees import CORRECTION_TREES, PRICE_TREES, TreeEnsemble

if TYPE_CHECKING:
    from word_models.kernel import Estimate, KernelModel
    from word_models.sparse_mlp import FittedMlp

RIDGE_PENALTY = 2.0
RIDGE_DENSE_STRENGTH = 0.3
"""The one penalty acts on all columns. Without this factor it would hardly touch amounts and meanings, whose values are
larger than TF-IDF weights."""
RIDGE_TOLERANCE = 1e-4
"""Relative error at which the iterative solver stops; it is far below the noise of prices."""

KERNEL_PRICE_STRENGTH = 2
"""Standard deviation of the kernel's price as an input of the MLP. The other inputs have 1; none says as much as it."""


class Model(Protocol):
    """What every model can do."""

    @classmethod
    def fit(cls, settings: WordModelSettings, features: Features, ln_price: np.ndarray) -> Self:
        """Fit to n rows with ln_price (n,)."""

    def predict(self, features: Features) -> np.ndarray:
        """ln price (m,) float64 of m rows. A row's price does not depend on the other rows."""

    def save(self, folder: Path) -> None:
        """Write the fitted model into an existing folder."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The model that `save` wrote; it predicts the same prices."""


@dataclass
class Ridge:
    """Ridge regression on terms, amounts and meanings."""

    coefficients: np.ndarray
    """(V + S + D,)"""
    intercept: float

    @staticmethod
    def columns(features: Features) -> sparse.csr_matrix:
        """(n, V + S + D)"""
        dense = sparse.csr_matrix(features.dense * RIDGE_DENSE_STRENGTH)
        return sparse.hstack([features.terms, dense], format="csr")

    @classmethod
    def fit(cls, settings: WordModelSettings, features: Features, ln_price: np.ndarray) -> Ridge:
        from sklearn.linear_model import Ridge as RidgeRegression

        model = RidgeRegression(alpha=RIDGE_PENALTY, solver="sparse_cg", tol=RIDGE_TOLERANCE)
        model.fit(cls.columns(features), ln_price)
        # the features are float32, and so is what scikit-learn returns; sums of many terms need more digits
        return cls(model.coef_.astype(np.float64), float(model.intercept_))

    def predict(self, features: Features) -> np.ndarray:
        return self.columns(features) @ self.coefficients + self.intercept

    def save(self, folder: Path) -> None:
        np.savez(folder / "ridge.npz", coefficients=self.coefficients, intercept=self.intercept)

    @classmethod
    def load(cls, folder: Path) -> Ridge:
        with np.load(folder / "ridge.npz") as arrays:
            return cls(arrays["coefficients"], float(arrays["intercept"]))


@dataclass
class Kernel:
    """Kernel ridge regression with a learned similarity (`word_models.kernel`)."""

    kernel: KernelModel

    @classmethod
    def fit(cls, settings: WordModelSettings, features: Features, ln_price: np.ndarray) -> Kernel:
        from word_models.kept_kernels import fit_or_read

        return cls(fit_or_read(settings, features, ln_price))

    def predict(self, features: Features) -> np.ndarray:
        return self.kernel.estimate(features).ln_price

    def save(self, folder: Path) -> None:
        self.kernel.save(folder)

    @classmethod
    def load(cls, folder: Path) -> Kernel:
        from word_models.kernel import KernelModel

        return cls(KernelModel.load(folder))


@dataclass
class Boosted:
    """The kernel's price, corrected by trees that are fitted to its leave-one-out errors."""

    kernel: KernelModel
    correction: TreeEnsemble

    @staticmethod
    def columns(features: Features, by_kernel: Estimate) -> np.ndarray:
        """What the trees see: the kernel's price, its surroundings, and the structural columns."""
        return np.column_stack([by_kernel.ln_price, by_kernel.surroundings, features.structural])

    @classmethod
    def fit(cls, settings: WordModelSettings, features: Features, ln_price: np.ndarray) -> Boosted:
        from word_models.kept_kernels import fit_or_read

        return cls.on_kernel(fit_or_read(settings, features, ln_price), settings, features, ln_price)

    @classmethod
    def on_kernel(
        cls, kernel: KernelModel, settings: WordModelSettings, features: Features, ln_price: np.ndarray
    ) -> Boosted:
        """Fit the trees to the errors of a kernel that was fitted on the same rows."""
        # estimates of each fitted row by all others: what a new row's columns look like
        left_out = kernel.left_out
        error = ln_price - left_out.ln_price  # (n,)
        correction = TreeEnsemble.fit(settings, cls.columns(features, left_out), error, CORRECTION_TREES)
        return cls(kernel, correction)

    def predict(self, features: Features) -> np.ndarray:
        by_kernel = self.kernel.estimate(features)
        return by_kernel.ln_price + self.correction.predict(self.columns(features, by_kernel))

    def save(self, folder: Path) -> None:
        self.kernel.save(folder)
        self.correction.save(folder)

    @classmethod
    def load(cls, folder: Path) -> Boosted:
        from word_models.kernel import KernelModel

        return cls(KernelModel.load(folder), TreeEnsemble.load(folder))


@dataclass
class LightGbm:
    """Trees on an SVD of terms and meanings, on amounts and on the prices of similar products."""

    components: np.ndarray
    """(V + D, settings.svd) of the SVD"""
    neighbours: Neighbours
    trees: TreeEnsemble

    @staticmethod
    def content(features: Features) -> sparse.csr_matrix:
        """(n, V + D) terms and meanings."""
        views = [sparse.csr_matrix(view) for view in features.meanings]
        return sparse.hstack([features.terms, *views], format="csr")

    def columns(self, features: Features, *, skip_self: bool = False) -> np.ndarray:
        """What the trees see. `skip_self`: these are the fitted rows, and none may see its own price."""
        similar = np.column_stack(self.neighbours.prices(features, skip_self=skip_self))
        return np.hstack([self.content(features) @ self.components, features.structural, similar])

    @classmethod
    def fit(cls, settings: WordModelSettings, features: Features, ln_price: np.ndarray) -> LightGbm:
        from sklearn.decomposition import TruncatedSVD

        svd = TruncatedSVD(settings.svd, random_state=settings.seed).fit(cls.content(features))
        neighbours = Neighbours.fit(settings, features, ln_price)
        # stored by rows, so that a sparse row times the components reads only the rows of its terms
        model = cls(np.ascontiguousarray(svd.components_.T), neighbours, TreeEnsemble([]))
        model.trees = TreeEnsemble.fit(
            settings, model.columns(features, skip_self=True), ln_price, PRICE_TREES
        )
        return model

    def predict(self, features: Features) -> np.ndarray:
        return self.trees.predict(self.columns(features))

    def save(self, folder: Path) -> None:
        np.savez(folder / "svd.npz", components=self.components)
        self.neighbours.save(folder)
        self.trees.save(folder)

    @classmethod
    def load(cls, folder: Path) -> LightGbm:
        with np.load(folder / "svd.npz") as arrays:
            components = arrays["components"]
        return cls(components, Neighbours.load(folder), TreeEnsemble.load(folder))


@dataclass
class Mlp:
    """The mean of one sparse multilayer perceptron per seed (`word_models.sparse_mlp`)."""

    networks: list[FittedMlp]

    @staticmethod
    def bins(settings: WordModelSettings) -> int | None:
        """Bins of ln price that the networks predict a distribution over; None: they predict the price itself."""
        return None

    @classmethod
    def fit(cls, settings: WordModelSettings, features: Features, ln_price: np.ndarray) -> Self:
        from word_models.sparse_mlp import fit_mlp

        networks = []
        for seed in range(settings.seed, settings.seed + settings.seeds):
            networks.append(fit_mlp(settings, features, ln_price, seed, bins=cls.bins(settings)))
        return cls(networks)

    def predict(self, features: Features) -> np.ndarray:
        return np.mean([network.predict(features) for network in self.networks], axis=0)

    def save(self, folder: Path) -> None:
        for number, network in enumerate(self.networks):
            network.save(folder, f"mlp_{number}")

    @classmethod
    def load(cls, folder: Path) -> Self:
        from word_models.sparse_mlp import FittedMlp

        count = len(list(folder.glob("mlp_*.safetensors")))
        return cls([FittedMlp.load(folder, f"mlp_{number}") for number in range(count)])


class MlpDistribution(Mlp):
    """The sparse MLP over bins of ln price, read at the lowest expected SMAPE."""

    @staticmethod
    def bins(settings: WordModelSettings) -> int:
        return settings.bins


@dataclass
class MlpOnKernel:
    """The sparse MLP with the kernel's price and its surroundings as further columns."""

    kernel: KernelModel
    scaling: KernelScaling
    mlp: Mlp

    @classmethod
    def fit(cls, settings: WordModelSettings, features: Features, ln_price: np.ndarray) -> MlpOnKernel:
        from word_models.kept_kernels import fit_or_read

        return cls.on_kernel(fit_or_read(settings, features, ln_price), settings, features, ln_price)

    @classmethod
    def on_kernel(
        cls, kernel: KernelModel, settings: WordModelSettings, features: Features, ln_price: np.ndarray
    ) -> MlpOnKernel:
        """Fit the network beside a kernel that was fitted on the same rows."""
        # estimates of each fitted row by all others: what a new row's columns look like
        left_out = kernel.left_out
        scaling = KernelScaling.fit(left_out, ln_price)
        return cls(kernel, scaling, Mlp.fit(settings, scaling.add_to(features, left_out), ln_price))

    def predict(self, features: Features) -> np.ndarray:
        return self.mlp.predict(self.scaling.add_to(features, self.kernel.estimate(features)))

    def save(self, folder: Path) -> None:
        self.kernel.save(folder)
        self.scaling.save(folder)
        self.mlp.save(folder)

    @classmethod
    def load(cls, folder: Path) -> MlpOnKernel:
        from word_models.kernel import KernelModel

        return cls(KernelModel.load(folder), KernelScaling.load(folder), Mlp.load(folder))


@dataclass
class KernelScaling:
    """Standardises what the kernel says on the fitted rows, as all other columns are."""

    mean: np.ndarray
    """of each column of the surroundings"""
    deviation: np.ndarray
    price_mean: float
    price_deviation: float

    @classmethod
    def fit(cls, left_out: Estimate, ln_price: np.ndarray) -> KernelScaling:
        around = left_out.surroundings
        deviation = around.std(axis=0) + MIN_DEVIATION
        return cls(around.mean(axis=0), deviation, float(ln_price.mean()), float(ln_price.std()))

    def add_to(self, features: Features, by_kernel: Estimate) -> Features:
        """The features with the columns kernel_price and kernel_surroundings."""
        price = KERNEL_PRICE_STRENGTH * (by_kernel.ln_price - self.price_mean) / self.price_deviation
        around = (by_kernel.surroundings - self.mean) / self.deviation
        return features.with_columns({"kernel_price": price[:, None], "kernel_surroundings": around})

    def save(self, folder: Path) -> None:
        price = np.array([self.price_mean, self.price_deviation])
        np.savez(folder / "scaling.npz", mean=self.mean, deviation=self.deviation, price=price)

    @classmethod
    def load(cls, folder: Path) -> KernelScaling:
        with np.load(folder / "scaling.npz") as arrays:
            price_mean, price_deviation = arrays["price"].tolist()
            return cls(arrays["mean"], arrays["deviation"], price_mean, price_deviation)


MODELS: dict[str, type[Model]] = {
    "ridge": Ridge,
    "kernel": Kernel,
    "boosted": Boosted,
    "lightgbm": LightGbm,
    "neighbours": Neighbours,
    "mlp": Mlp,
    "mlp_on_kernel": MlpOnKernel,
    "mlp_distribution": MlpDistribution,
}
