"""A multilayer perceptron on sparse counts, and the price that a distribution over prices implies.

Legend: B batch, V terms, S structural features, K bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from word_models.config import WordModelSettings
from word_models.features import Features

LARGEST_BATCH_DOUBLINGS = 3
SOFT_LABEL_WIDTH = 0.25  # of a standard deviation of ln price: neighbouring bins are neighbouring prices


class SparseMlp(nn.Module):
    """ReLU(terms·W + structural·U) → ReLU layers → K outputs. A term's row of W is touched only where it occurs."""

    def __init__(self, *, terms: int, structural: int, hidden: int, outputs: int):
        super().__init__()
        self.terms = nn.EmbeddingBag(terms, hidden, mode="sum", sparse=True)
        nn.init.normal_(self.terms.weight, std=0.02)
        self.structural = nn.Linear(structural, hidden)
        self.layers = nn.Sequential(
            *(nn.ReLU(), nn.Linear(hidden, hidden // 2)),
            *(nn.ReLU(), nn.Linear(hidden // 2, hidden // 2)),
            *(nn.ReLU(), nn.Linear(hidden // 2, outputs)),
        )

    def forward(self, indices: Tensor, offsets: Tensor, values: Tensor, structural: Tensor) -> Tensor:
        """The B rows of a csr matrix as (indices, offsets, values), structural (B, S) → (B, K)."""
        return self.layers(
            self.terms(indices, offsets, per_sample_weights=values) + self.structural(structural)
        )


class PriceBins:
    """Bins of standardised ln price, (K,) centres, and the decision that a distribution over them implies."""

    def __init__(self, count: int, scale: float):
        self.scale = scale  # ln price a standard deviation
        self.centres = torch.linspace(-2.8, 3.0, count)
        self.candidates = torch.linspace(-2.8, 3.0, 4 * count)
        # SMAPE/200 of each candidate price if a bin's price is the true one: tanh(|ln p - ln a| / 2)
        distance = (self.candidates[:, None] - self.centres[None, :]).abs()
        self.cost = torch.tanh(distance * scale / 2)  # (4K, K)

    def soft_labels(self, target: Tensor) -> Tensor:
        """(B,) standardised ln price → (B, K) distribution around it."""
        return torch.softmax(-0.5 * ((self.centres - target[:, None]) / SOFT_LABEL_WIDTH) ** 2, dim=1)

    def best_price(self, probability: Tensor) -> Tensor:
        """(B, K) → (B,) the candidate with the lowest expected SMAPE, in standardised ln price."""
        return self.candidates[(probability @ self.cost.T).argmin(dim=1)]


@dataclass
class FittedMlp:
    """A trained network and the scale of the prices that it was trained on."""

    network: SparseMlp
    bins: PriceBins | None
    mean: float
    """mean ln price of the fitted rows"""
    scale: float
    """their standard deviation"""

    def predict(self, features: Features) -> np.ndarray:
        """ln price, (N,) float64."""
        return predict(self.network, features, self.bins).double().numpy() * self.scale + self.mean


def fit_predict(
    settings: WordModelSettings, fit: Features, ln_price: np.ndarray, apply: Features, seed: int
) -> np.ndarray:
    """Train one network on `fit` (ln_price (n,)) and return ln price of `apply`, (m,) float64."""
    return fit_mlp(settings, fit, ln_price, seed).predict(apply)


def fit_mlp(settings: WordModelSettings, fit: Features, ln_price: np.ndarray, seed: int) -> FittedMlp:
    """Train one network on `fit`, ln_price (n,)."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    mean, scale = float(ln_price.mean()), float(ln_price.std())
    target = torch.from_numpy(((ln_price - mean) / scale).astype(np.float32))
    bins = PriceBins(settings.bins, scale) if settings.model == "mlp_distribution" else None
    model = SparseMlp(
        terms=fit.terms.shape[1],
        structural=fit.dense.shape[1],
        hidden=settings.hidden,
        outputs=settings.bins if bins else 1,
    )
    dense = [parameter for name, parameter in model.named_parameters() if not name.startswith("terms.")]
    optimizers = [
        torch.optim.SparseAdam([model.terms.weight], settings.lr),
        torch.optim.Adam(dense, settings.lr),
    ]
    for epoch in tqdm(range(settings.epochs), desc=f"mlp, seed {seed}", unit=" epochs", leave=False):
        size = 64 * 2 ** min(epoch, LARGEST_BATCH_DOUBLINGS)
        for rows in np.array_split(order.permutation(len(ln_price)), max(1, len(ln_price) // size)):
            indices, offsets, values, structural = as_tensors(fit[rows])
            kept = torch.rand(len(values)) >= settings.word_dropout
            output = model(indices, offsets, values * kept / (1 - settings.word_dropout), structural)
            if bins:
                loss = -(bins.soft_labels(target[rows]) * output.log_softmax(dim=1)).sum(dim=1).mean()
            else:
                loss = torch.tanh((output[:, 0] - target[rows]).abs() * scale / 2).mean()  # SMAPE / 200
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    return FittedMlp(model, bins, mean, scale)


@torch.no_grad()
def predict(model: SparseMlp, features: Features, bins: PriceBins | None, batch: int = 2048) -> Tensor:
    """Standardised ln price, (N,)."""
    outputs = []
    for start in range(0, len(features.structural), batch):
        output = model(*as_tensors(features[np.arange(start, min(start + batch, len(features.structural)))]))
        outputs.append(bins.best_price(F.softmax(output, dim=1)) if bins else output[:, 0])
    return torch.cat(outputs)


def as_tensors(features: Features) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrix = features.terms
    return (
        torch.from_numpy(matrix.indices.astype(np.int64)),
        torch.from_numpy(matrix.indptr[:-1].astype(np.int64)),
        torch.from_numpy(matrix.data),
        torch.from_numpy(features.dense),
    )
