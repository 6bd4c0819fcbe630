"""Kernel ridge regression whose similarity is learned: what alike products of alike amounts cost.

    k(i, j) = Σ_g s_g · exp(−Σ_b θ_gb (1 − cos_b(i, j)) − Σ_a γ_ga |a_i − a_j|² / 2),  g = 1 … 3

b runs over the blocks of words and the views of meaning, a over the amounts. One sum can ask for the same words and
forgive the amount while another asks for the same amount of something similar. Scales, rates and the noise minimise
the SMAPE of leave-one-out predictions, which kernel ridge regression gives in closed form (Rasmussen & Williams 2006,
"Gaussian processes for machine learning", equation 5.12), by gradient descent on two samples of rows in turn.

A second model learns where this one errs, from its prices and from what similar products cost (`Estimate`).

Legend: n fitted rows, m asked rows, C comparisons (blocks, views, amounts), G sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from contracts.errors import InputError
from word_models.config import WordModelSettings
from word_models.features import Features
from word_models.surroundings import PRICES, surroundings

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

    def log(self, differences: Tensor) -> Tensor:
        """(C, m, n) → (m, n) logarithm of the kernel as a share of its largest value."""
        share = self(differences) / self.scale.exp().sum()
        return share.clamp(min=torch.finfo(share.dtype).tiny).log()

    def of_words(self, amounts: int) -> Similarity:
        """The same without the last `amounts` comparisons."""
        rate = self.rate.clone()
        rate[:, -amounts:] = -torch.inf
        return replace(self, rate=rate)


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


def learn(settings: WordModelSettings, fit: Features, ln_price: np.ndarray) -> Similarity:
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
class Estimate:
    """What the kernel says of m rows; of fitted rows, by the other fitted rows alone."""

    ln_price: np.ndarray
    """(m,) float64"""
    surroundings: np.ndarray
    """(m, S) float32: the columns of `word_models.surroundings` in the similarity of everything and in that of words
    alone, the prices among them as differences from ln_price"""

    @classmethod
    def of(cls, ln_price: np.ndarray, near: Tensor) -> Estimate:
        """near (m, 2, P, 4)"""
        columns = near.numpy().copy()
        columns[..., :PRICES] -= ln_price[:, None, None, None]
        return cls(ln_price, columns.reshape(len(columns), -1))


@dataclass
class KernelModel:
    similarity: Similarity
    rows: Features
    """the n fitted rows"""
    ln_price: Tensor
    """(n,) float32, theirs"""
    weights: Tensor
    """(n,) of the fitted rows in every prediction"""
    left_out: Estimate
    """of the fitted rows"""

    @classmethod
    def fit(cls, settings: WordModelSettings, rows: Features, ln_price: np.ndarray) -> KernelModel:
        """Learn the similarity from `rows` and fit the regression to all of them, ln_price (n,).

        Raises:
            InputError: more rows than a matrix of all pairs may have.
        """
        if len(ln_price) > LARGEST:
            raise InputError(
                f"--model {settings.model}: {len(ln_price)} rows, it holds at most {LARGEST} in memory"
            )
        similarity, known = learn(settings, rows, ln_price), torch.from_numpy(ln_price).float()
        gram, near = compare(similarity, rows, rows, known, leave_out_self=True)
        inverse = torch.linalg.inv(_with_noise(gram, similarity))
        weights = inverse @ (known - known.mean())
        left_out = ln_price - (weights / inverse.diagonal()).double().numpy()
        return cls(similarity, rows, known, weights, Estimate.of(left_out, near))

    def estimate(self, asked: Features) -> Estimate:
        """What all fitted rows say of other rows."""
        gram, near = compare(self.similarity, asked, self.rows, self.ln_price)
        return Estimate.of((self.ln_price.mean() + gram @ self.weights).double().numpy(), near)


@torch.no_grad()
def compare(
    similarity: Similarity, asked: Features, fit: Features, ln_price: Tensor, *, leave_out_self: bool = False
) -> tuple[Tensor, Tensor]:
    """Kernel (m, n), and surroundings (m, 2, P, 4) by everything and by words alone, in slabs of asked rows.

    `leave_out_self` is for asked rows that are the fitted ones: none sees its own price in its surroundings.
    """
    of_words = similarity.of_words(len(fit.compared_amounts))
    amount = torch.from_numpy(fit.structural[:, 0])
    grams, near = [], []
    for start in range(0, len(asked.structural), SLAB):
        slab = np.arange(start, min(start + SLAB, len(asked.structural)))
        compared = differences(asked[slab], fit)
        logs = [by.log(compared) for by in (similarity, of_words)]
        if leave_out_self:
            for log in logs:
                log[np.arange(len(slab)), slab] = -torch.inf
        asked_amount = torch.from_numpy(asked.structural[slab, 0])
        near.append(torch.stack([surroundings(log, ln_price, amount, asked_amount) for log in logs], dim=1))
        grams.append(similarity(compared))
    return torch.cat(grams), torch.cat(near)
