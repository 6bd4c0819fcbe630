"""A multilayer perceptron on sparse counts that predicts ln price, or a distribution over bins of it.

Legend: B batch, V terms, S dense columns, K outputs: 1, or the bins of ln price.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from contracts.files import read_json, write_json
from training.smape_loss import smape_of_ln
from training.weights import read_weights, save_weights
from word_models.config import MlpSettings
from word_models.features import Features
from word_models.loss import smape_fraction

BATCH_SIZES = (64, 128, 256, 512, 512, 512)
"""Batch size of each part of the training, in place of a falling learning rate (Smith et al. 2018, "Don't decay the
learning rate, increase the batch size"). A part is one pass over the rows, or several where rows are few."""
TERM_INIT_STD = 0.02
"""PyTorch starts an embedding with a deviation of 1, which lets the terms drown the amounts."""
PREDICT_BATCH = 2_048

LOWEST_PRICE = -2.8
HIGHEST_PRICE = 3.0
"""Outermost bins, in standard deviations of ln price from its mean. Hardly any price lies beyond; the tail of expensive
products is the longer one."""
CANDIDATES_PER_BIN = 4
"""Prices that are considered per bin, so that the answer is finer than the bins."""
SOFT_LABEL_WIDTH = 0.25
"""Width of a label in standard deviations of ln price: neighbouring bins are neighbouring prices."""


class SparseMlp(nn.Module):
    """ReLU(terms·W + dense·U) → ReLU layers → K outputs. A row of W is touched only where its term occurs."""

    def __init__(self, *, terms: int, dense: int, hidden: int, outputs: int):
        super().__init__()
        self.terms = nn.EmbeddingBag(terms, hidden, mode="sum", sparse=True)
        nn.init.normal_(self.terms.weight, std=TERM_INIT_STD)
        self.dense = nn.Linear(dense, hidden)
        half = hidden // 2
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Linear(hidden, half),
            nn.ReLU(), nn.Linear(half, half),
            nn.ReLU(), nn.Linear(half, outputs),
        )  # fmt: skip

    def first_layer(self, indices: Tensor, offsets: Tensor, values: Tensor, dense: Tensor) -> Tensor:
        """B rows of counts in csr form (as `as_tensors` returns them) and dense columns (B, S) → (B, hidden)."""
        # a sum of embeddings weighted by the counts is the product of the sparse matrix with W
        return self.terms(indices, offsets, per_sample_weights=values) + self.dense(dense)

    def forward(self, indices: Tensor, offsets: Tensor, values: Tensor, dense: Tensor) -> Tensor:
        """The same arguments → (B, K)."""
        return self.layers(self.first_layer(indices, offsets, values, dense))


class PriceBins:
    """Bins of standardised ln price, and the price that a distribution over them implies."""

    def __init__(self, count: int, scale: float):
        """`count` bins K; `scale` is the standard deviation of ln price."""
        self.centres = torch.linspace(LOWEST_PRICE, HIGHEST_PRICE, count)
        self.candidates = torch.linspace(LOWEST_PRICE, HIGHEST_PRICE, CANDIDATES_PER_BIN * count)
        # SMAPE of each candidate if the price of a bin is the true one, (4 K, K)
        self.cost = smape_of_ln((self.candidates[:, None] - self.centres[None, :]) * scale)

    def soft_labels(self, target: Tensor) -> Tensor:
        """(B,) standardised ln price → (B, K) distribution around it: a Gaussian of SOFT_LABEL_WIDTH."""
        distance = (self.centres - target[:, None]) / SOFT_LABEL_WIDTH  # (B, K)
        return torch.softmax(-0.5 * distance**2, dim=1)

    def best_price(self, probability: Tensor) -> Tensor:
        """(B, K) → (B,) the candidate with the lowest expected SMAPE, in standardised ln price."""
        expected = probability @ self.cost.T  # (B, 4 K)
        return self.candidates[expected.argmin(dim=1)]


@dataclass
class FittedMlp:
    """A trained network with the scale of the prices that it was trained on."""

    network: SparseMlp
    bins: PriceBins | None
    """None where the network predicts the price itself"""
    mean: float
    """mean ln price of the fitted rows"""
    scale: float
    """standard deviation of the same"""

    @torch.no_grad()
    def predict(self, features: Features) -> np.ndarray:
        """ln price, (N,) float64."""
        outputs = []
        for rows in np.split(np.arange(len(features)), range(PREDICT_BATCH, len(features), PREDICT_BATCH)):
            output = self.network(*as_tensors(features[rows]))
            if self.bins is None:
                outputs.append(output[:, 0])
            else:
                outputs.append(self.bins.best_price(F.softmax(output, dim=1)))  # (B,)
        return torch.cat(outputs).double().numpy() * self.scale + self.mean

    def save(self, folder: Path, name: str) -> None:
        """Write <name>.safetensors and, with the scale of prices and the number of bins, <name>.json."""
        save_weights(folder / f"{name}.safetensors", self.network.state_dict())
        bins = None if self.bins is None else len(self.bins.centres)
        write_json(folder / f"{name}.json", {"bins": bins, "mean": self.mean, "scale": self.scale})

    @classmethod
    def load(cls, folder: Path, name: str) -> FittedMlp:
        content = read_json(folder / f"{name}.json")
        weights = read_weights(folder / f"{name}.safetensors")
        terms, hidden = weights["terms.weight"].shape
        bins = content["bins"]
        # on "meta" the network has shapes and no numbers, which would be drawn for nothing
        with torch.device("meta"):
            dense = weights["dense.weight"].shape[1]
            network = SparseMlp(terms=terms, dense=dense, hidden=hidden, outputs=bins or 1)
        network.load_state_dict(weights, assign=True)
        price_bins = PriceBins(bins, content["scale"]) if bins else None
        return cls(network, price_bins, content["mean"], content["scale"])


def fit_mlp(
    settings: MlpSettings, fit: Features, ln_price: np.ndarray, seed: int, *, bins: int | None = None
) -> FittedMlp:
    """Train one network on `fit`, ln_price (n,).

    Args:
        settings: updates, hidden, lr and word_dropout are used.
        fit: the n rows.
        ln_price: (n,)
        seed: of weights, order and word dropout.
        bins: number of bins K that the network predicts a distribution over; None to predict the price itself.
    """
    # the order has its own generator, so that it does not depend on the number of weights
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    mean = float(ln_price.mean())
    scale = float(ln_price.std())
    # networks learn a target of mean 0 and deviation 1; SMAPE needs the scale back
    target = torch.from_numpy(((ln_price - mean) / scale).astype(np.float32))
    price_bins = PriceBins(bins, scale) if bins else None
    network = SparseMlp(
        terms=fit.terms.shape[1], dense=fit.dense.shape[1], hidden=settings.hidden, outputs=bins or 1
    )

    # SparseAdam updates only the rows of terms that occur in the batch
    others = [parameter for name, parameter in network.named_parameters() if name != "terms.weight"]
    optimizers = [
        torch.optim.SparseAdam([network.terms.weight], settings.lr),
        torch.optim.Adam(others, settings.lr),
    ]
    passes = batches_of_passes(len(ln_price), settings.updates)
    for batches in tqdm(passes, desc=f"mlp, seed {seed}", unit=" passes", leave=False):
        for rows in np.array_split(order.permutation(len(ln_price)), batches):
            indices, offsets, values, dense = as_tensors(fit[rows])
            kept = torch.rand(len(values)) >= settings.word_dropout
            # as in dropout, what is kept grows, so that the sum has the same mean as at prediction
            values = values * kept / (1 - settings.word_dropout)
            output = network(indices, offsets, values, dense)  # (B, K)
            if price_bins:
                labels = price_bins.soft_labels(target[rows])
                loss = -(labels * output.log_softmax(dim=1)).sum(dim=1).mean()  # cross-entropy
            else:
                loss = smape_fraction((output[:, 0] - target[rows]) * scale)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    return FittedMlp(network, price_bins, mean, scale)


def batches_of_passes(rows: int, updates: int) -> list[int]:
    """Number of batches in each pass over `rows` rows, so that there are at least `updates` batches in all."""
    batches = [max(1, rows // size) for size in BATCH_SIZES]
    passes_per_part = math.ceil(updates / sum(batches))
    return [count for count in batches for _ in range(passes_per_part)]


def as_tensors(features: Features) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts of B rows as EmbeddingBag takes them, and their dense columns.

    Returns:
        indices (entries,) of terms; offsets (B,) at which each row's entries begin; values (entries,); dense (B, S).
    """
    matrix = features.terms
    return (
        torch.from_numpy(matrix.indices.astype(np.int64)),
        torch.from_numpy(matrix.indptr[:-1].astype(np.int64)),
        torch.from_numpy(matrix.data),
        torch.from_numpy(features.dense),
    )
