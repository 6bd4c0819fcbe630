"""Kernel ridge regression whose similarity is learned: what alike products of alike amounts cost.

    k(i, j) = Σ_g s_g · exp(−Σ_b θ_gb (1 − cos_b(i, j)) − Σ_a γ_ga |a_i − a_j|² / 2),  g = 1 … 3

b runs over the blocks of words and the views of meaning, a over the amounts. One sum can ask for the same words and
forgive the amount while another asks for the same amount of something similar. Scales, rates and the noise minimise
the SMAPE of leave-one-out predictions, which kernel ridge regression gives in closed form (Rasmussen & Williams 2006,
"Gaussian processes for machine learning", equation 5.12), by gradient descent on two samples of rows in turn.

Legend: n fitted rows, m asked rows, C comparisons (blocks, views, amounts), G sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from contracts.errors import InputError
from tfidf_models.config import TfidfSettings
from tfidf_models.features import Features

LARGEST = 30_000  # rows: 3.6 GB a matrix, and three of them
SUMS = 3
SAMPLE = 2_800  # rows that the similarity is learned from, twice
SLAB = 1_024  # rows compared at once with all fitted rows


@dataclass
class Similarity:
    """The numbers that are learned, all as logarithms."""

    rate: Tensor
    """(G, C) θ and γ"""
    scale: Tensor
    """(G,) s"""
    noise: Tensor
    """() variance of ln price that no similarity explains: the ridge"""

    @classmethod
    def start(cls, comparisons: int, amounts: int, seed: int) -> Similarity:
        """Slightly different sums; only the last asks for the same amounts."""
        rate = torch.full((SUMS, comparisons), -1.5)
        rate[:, comparisons - amounts :] = -4.0
        rate[-1, comparisons - amounts :] = -1.5
        rate += 0.3 * torch.randn(rate.shape, generator=torch.Generator().manual_seed(seed))
        return cls(rate, torch.zeros(SUMS), torch.tensor(-2.5))

    def __call__(self, differences: Tensor) -> Tensor:
        """(C, m, n) → (m, n) kernel."""
        exponent = -(self.rate.exp() @ differences.flatten(1)).unflatten(1, differences.shape[1:])
        return torch.einsum("g,gmn->mn", self.scale.exp(), exponent.exp())


def differences(asked: Features, fit: Features) -> Tensor:
    """How each asked row differs from each fitted row, (C, m, n): 1 − cosine of every block and view, half the squared
    distance of every amount."""
    from sklearn.preprocessing import normalize

    cosines = [
        (normalize(asked.terms[:, block]) @ normalize(fit.terms[:, block]).T).toarray()
        for block in fit.compared_blocks
    ]
    cosines += [a @ f.T for a, f in zip(asked.meanings, fit.meanings, strict=True)]
    found = torch.empty(len(cosines) + len(fit.compared_amounts), len(asked.structural), len(fit.structural))
    for position, cosine in enumerate(cosines):
        found[position] = 1 - torch.from_numpy(cosine)
    for position, columns in enumerate(fit.compared_amounts, len(cosines)):
        a, f = (torch.from_numpy(rows.structural[:, columns]) for rows in (asked, fit))
        found[position] = torch.cdist(a, f, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(0.5)
    return found


def learn(settings: TfidfSettings, fit: Features, ln_price: np.ndarray) -> Similarity:
    """Adam on the SMAPE of leave-one-out predictions."""
    shuffled = np.random.default_rng(settings.seed).permutation(len(ln_price))
    samples = [sample[:SAMPLE] for sample in np.array_split(shuffled, 2)]
    compared = [differences(fit[sample], fit[sample]) for sample in samples]
    targets = [torch.from_numpy(ln_price[sample] - ln_price[sample].mean()).float() for sample in samples]
    similarity = Similarity.start(len(compared[0]), len(fit.compared_amounts), settings.seed)
    learned = [similarity.rate, similarity.scale, similarity.noise]
    for tensor in learned:
        tensor.requires_grad_()
    optimizer = torch.optim.Adam(learned)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.15, settings.kernel_steps, pct_start=0.1)
    for step in tqdm(range(settings.kernel_steps), desc="similarity", unit=" steps", leave=False):
        gram, target = similarity(compared[step % 2]), targets[step % 2]
        inverse = torch.linalg.inv(_with_noise(gram, similarity))
        left_out_error = (inverse @ target) / inverse.diagonal()
        loss = torch.tanh(left_out_error.abs() / 2).mean()  # SMAPE / 200
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Similarity(*(tensor.detach() for tensor in learned))


def _with_noise(gram: Tensor, similarity: Similarity) -> Tensor:
    return gram + similarity.noise.exp() * torch.eye(len(gram))


@dataclass
class KernelModel:
    similarity: Similarity
    rows: Features
    """the n fitted rows"""
    mean: float
    """their mean ln price"""
    weights: Tensor
    """(n,) of the fitted rows in every prediction"""
    left_out: np.ndarray
    """(n,) ln price of each fitted row by all others"""

    @classmethod
    def fit(cls, settings: TfidfSettings, rows: Features, ln_price: np.ndarray) -> KernelModel:
        """Learn the similarity from `rows` and fit the regression to all of them, ln_price (n,).

        Raises:
            InputError: more rows than a matrix of all pairs may have.
        """
        if len(ln_price) > LARGEST:
            raise InputError(
                f"--model {settings.model}: {len(ln_price)} rows, it holds at most {LARGEST} in memory"
            )
        similarity, mean = learn(settings, rows, ln_price), float(ln_price.mean())
        known = torch.from_numpy(ln_price - mean).float()
        inverse = torch.linalg.inv(_with_noise(_kernel(similarity, rows, rows), similarity))
        weights = inverse @ known
        left_out = ln_price - (weights / inverse.diagonal()).double().numpy()
        return cls(similarity, rows, mean, weights, left_out)

    def predict(self, asked: Features) -> np.ndarray:
        """ln price, (m,) float64."""
        return self.mean + (_kernel(self.similarity, asked, self.rows) @ self.weights).double().numpy()


@torch.no_grad()
def _kernel(similarity: Similarity, asked: Features, fit: Features) -> Tensor:
    """(m, n), compared in slabs."""
    starts = range(0, len(asked.structural), SLAB)
    slabs = [asked[np.arange(start, min(start + SLAB, len(asked.structural)))] for start in starts]
    return torch.cat([similarity(differences(slab, fit)) for slab in slabs])
