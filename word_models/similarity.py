"""A learned similarity of products: how much similar words, similar meanings and similar amounts each count.

    k(i, j) = Σ_g s_g · exp(−Σ_b θ_gb (1 − cos_b(i, j)) − Σ_a γ_ga |a_i − a_j|² / 2),  g = 1 … 3

b runs over the blocks of words and the views of meaning, a over the amounts. With several sums, one can ask for the
same words and forgive the amount while another asks for the same amount of something similar. Scales s, rates θ and γ,
and the noise minimise the SMAPE of leave-one-out predictions, which kernel ridge regression gives in closed form
(Rasmussen & Williams 2006, "Gaussian processes for machine learning", equation 5.12). They are learned by gradient
descent on two samples of rows in turn.

Legend: n fitted rows, m asked rows, C comparisons (blocks, views, amounts), G sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from word_models.compared import ComparedRows
from word_models.config import WordModelSettings
from word_models.loss import smape_fraction

SUMS = 3
SAMPLE_ROWS = 2_800
"""Rows in each of the two samples that the similarity is learned from: half of 5,600, the rows outside a hold-out of
7,000. The inverse at each step costs the cube of this number."""
LEARNING_RATE = 0.15
"""Highest learning rate. What is learned are logarithms, so a step changes a rate by up to 16 %."""
AMOUNTS_IN_PLACES = 0.25
"""Strength of the amounts in `places`. At their full rate, the few rows of unusual amounts would decide which rows are
near, while most sums of the kernel forgive the amount."""
WARM_UP = 0.1
"""Fraction of the steps in which the learning rate rises."""

# Where learning starts. All are logarithms.
START_RATE = -1.5
"""A rate of 0.22: products without a common word are 0.8 times as similar, in one comparison, as equal ones."""
START_RATE_FORGIVING = -4.0
"""A rate of 0.02, of amounts in all sums but the last: they hardly look at the amount."""
START_SPREAD = 0.3
"""Standard deviation of the random part of the rates. Equal sums would learn the same."""
START_NOISE = -2.5
"""A variance of 0.08: prices of products that are equal in everything known differ by about 30 %."""


@dataclass
class Similarity:
    """The numbers that are learned, all of them logarithms."""

    rate: Tensor
    """(G, C) θ and γ; the amounts are the last comparisons"""
    scale: Tensor
    """(G,) s"""
    noise: Tensor
    """() variance of ln price that no similarity explains: the penalty of the ridge regression"""

    @classmethod
    def start(cls, comparisons: int, amounts: int, seed: int) -> Similarity:
        """Sums that differ slightly from each other; only the last asks for the same amounts."""
        first_amount = comparisons - amounts
        rate = torch.full((SUMS, comparisons), START_RATE)
        rate[:-1, first_amount:] = START_RATE_FORGIVING
        random = torch.Generator().manual_seed(seed)
        rate += START_SPREAD * torch.randn(rate.shape, generator=random)
        return cls(rate, scale=torch.zeros(SUMS), noise=torch.tensor(START_NOISE))

    def __call__(self, differences: Tensor) -> Tensor:
        """(C, m, n) → (m, n) kernel."""
        exponent = -(self.rate.exp() @ differences.flatten(1))  # (G, m·n)
        exponent = exponent.unflatten(1, differences.shape[1:])  # (G, m, n)
        return torch.einsum("g,gmn->mn", self.scale.exp(), exponent.exp())

    def of_first(self, comparisons: int) -> Similarity:
        """The same similarity in the first comparisons alone."""
        return replace(self, rate=self.rate[:, :comparisons])

    def double(self) -> Similarity:
        """The same similarity in float64."""
        return Similarity(self.rate.double(), self.scale.double(), self.noise.double())

    def with_noise(self, gram: Tensor) -> Tensor:
        """(n, n) kernel of the fitted rows → the matrix that ridge regression inverts."""
        return gram + self.noise.exp() * torch.eye(len(gram))


def places(similarity: Similarity, rows: ComparedRows) -> np.ndarray:
    """Where rows lie, (N, D) float32: the closer, the more similar in views and amounts.

    Half the squared distance is the exponent of the formula with the mean rate of all sums, weighted by their scales,
    and with weaker amounts (AMOUNTS_IN_PLACES). Words do not enter: the views stand for them, and a random projection
    of the words beside the views changed no score.
    """
    weight = torch.softmax(similarity.scale, dim=0)  # (G,)
    rate = (weight @ similarity.rate.exp()).sqrt().numpy()  # (C,)
    columns = []
    for position, view in enumerate(rows.views, start=len(rows.words)):
        # 1 − cosine is half the squared distance of vectors of length 1
        columns.append(rate[position] * view)
    for position, amounts in enumerate(rows.amounts.values(), start=len(rows.words) + len(rows.views)):
        columns.append(AMOUNTS_IN_PLACES * rate[position] * amounts)
    return np.hstack(columns)


def learn(settings: WordModelSettings, fit: ComparedRows, ln_price: np.ndarray) -> Similarity:
    """The similarity after `settings.kernel_steps` steps of Adam on the SMAPE of leave-one-out predictions.

    ln_price is (n,). Large catalogues are learned from two samples of SAMPLE_ROWS rows, small ones from two halves.
    """
    # steps on two samples in turn, so that what is learned does not fit one of them too closely
    shuffled = np.random.default_rng(settings.seed).permutation(len(ln_price))
    compared = []
    targets = []
    for half in np.array_split(shuffled, 2):
        sample = half[:SAMPLE_ROWS]
        compared.append(fit[sample].differences(fit[sample]))  # (C, rows, rows), once and not per step
        targets.append(torch.from_numpy(ln_price[sample] - ln_price[sample].mean()).float())

    similarity = Similarity.start(len(compared[0]), len(fit.amounts), settings.seed)
    learned = [similarity.rate, similarity.scale, similarity.noise]
    for tensor in learned:
        tensor.requires_grad_()
    optimizer = torch.optim.Adam(learned)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, settings.kernel_steps, pct_start=WARM_UP
    )
    for step in tqdm(range(settings.kernel_steps), desc="similarity", unit=" steps", leave=False):
        target = targets[step % 2]
        gram = similarity(compared[step % 2])
        inverse = torch.linalg.inv(similarity.with_noise(gram))
        # equation 5.12: the error of each row, were the regression fitted without it
        left_out_error = (inverse @ target) / inverse.diagonal()
        loss = smape_fraction(left_out_error)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Similarity(*(tensor.detach() for tensor in learned))
