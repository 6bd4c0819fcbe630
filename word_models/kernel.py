"""Kernel ridge regression with a learned similarity: a product costs what similar products of similar amounts cost.

    k(i, j) = Σ_g s_g · exp(−Σ_b θ_gb (1 − cos_b(i, j)) − Σ_a γ_ga |a_i − a_j|² / 2),  g = 1 … 3

b runs over the blocks of words and the views of meaning, a over the amounts. With several sums, one can ask for the
same words and forgive the amount while another asks for the same amount of something similar. Scales s, rates θ and γ,
and the noise minimise the SMAPE of leave-one-out predictions, which kernel ridge regression gives in closed form
(Rasmussen & Williams 2006, "Gaussian processes for machine learning", equation 5.12). They are learned by gradient
descent on two samples of rows in turn.

A second model learns where this one errs, from its prices and from what similar products cost (`Estimate`).

Legend: n fitted rows, m asked rows, C comparisons (blocks, views, amounts), G sums, P powers.
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
from word_models.loss import smape_fraction
from word_models.surroundings import PRICE_COLUMNS, surroundings

MAX_ROWS = 30_000
"""Fitted rows: a matrix of all pairs then takes 3.6 GB, and three of them are held."""
ROWS_AT_ONCE = 1_024
"""Asked rows that are compared together with all fitted rows. The number bounds memory and changes no result."""

SUMS = 3
SAMPLE_ROWS = 2_800
"""Rows in each of the two samples that the similarity is learned from: half of 5,600, the rows outside a hold-out of
7,000. The inverse at each step costs the cube of this number."""
LEARNING_RATE = 0.15
"""Highest learning rate. What is learned are logarithms, so a step changes a rate by up to 16 %."""
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

    def log(self, differences: Tensor) -> Tensor:
        """(C, m, n) → (m, n) logarithm of the kernel as a fraction of its largest value."""
        # equal products have the largest kernel: all exponentials are 1, and the scales remain
        fraction = self(differences) / self.scale.exp().sum()
        return fraction.clamp(min=torch.finfo(fraction.dtype).tiny).log()

    def of_words(self, amounts: int) -> Similarity:
        """The same similarity without the last `amounts` comparisons."""
        rate = self.rate.clone()
        rate[:, -amounts:] = -torch.inf  # a rate of 0: the difference does not count
        return replace(self, rate=rate)

    def with_noise(self, gram: Tensor) -> Tensor:
        """(n, n) kernel of the fitted rows → the matrix that ridge regression inverts."""
        return gram + self.noise.exp() * torch.eye(len(gram))


def differences(asked: Features, fit: Features) -> Tensor:
    """How each asked row differs from each fitted row in each comparison, (C, m, n).

    Blocks of words and views of meaning differ by 1 − cosine, amounts by half the squared distance.
    """
    from sklearn.preprocessing import normalize

    cosines = []
    for block in fit.compared_terms:
        asked_terms = normalize(asked.terms[:, block])
        fit_terms = normalize(fit.terms[:, block])
        cosines.append((asked_terms @ fit_terms.T).toarray())  # (m, n)
    for asked_view, fit_view in zip(asked.meanings, fit.meanings, strict=True):
        cosines.append(asked_view @ fit_view.T)  # rows of a view have length 1 already

    # filled in place: stacking a list would hold everything twice
    found = torch.empty(len(cosines) + len(fit.compared_columns), len(asked), len(fit))
    for position, cosine in enumerate(cosines):
        found[position] = 1 - torch.from_numpy(cosine)
    for position, name in enumerate(fit.compared_columns, start=len(cosines)):
        asked_amount = torch.from_numpy(asked.columns_named(name))
        fit_amount = torch.from_numpy(fit.columns_named(name))
        # the default computes |a|² + |b|² − 2ab, which loses the small distances that matter
        distance = torch.cdist(asked_amount, fit_amount, compute_mode="donot_use_mm_for_euclid_dist")
        found[position] = distance.square_().mul_(0.5)
    return found


def learn(settings: WordModelSettings, fit: Features, ln_price: np.ndarray) -> Similarity:
    """The similarity after `settings.kernel_steps` steps of Adam on the SMAPE of leave-one-out predictions.

    ln_price is (n,). Large catalogues are learned from two samples of SAMPLE_ROWS rows, small ones from two halves.
    """
    # steps on two samples in turn, so that what is learned does not fit one of them too closely
    shuffled = np.random.default_rng(settings.seed).permutation(len(ln_price))
    compared = []
    targets = []
    for half in np.array_split(shuffled, 2):
        sample = half[:SAMPLE_ROWS]
        compared.append(differences(fit[sample], fit[sample]))  # (C, rows, rows), once and not per step
        targets.append(torch.from_numpy(ln_price[sample] - ln_price[sample].mean()).float())

    similarity = Similarity.start(len(compared[0]), len(fit.compared_columns), settings.seed)
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


@dataclass
class Estimate:
    """What the kernel says of m rows. Fitted rows are estimated from the other fitted rows alone."""

    ln_price: np.ndarray
    """(m,) float64"""
    surroundings: np.ndarray
    """(m, 8 P) float32: the columns of `word_models.surroundings`, first by the similarity of everything, then by that
    of words alone; the prices among them are differences from `ln_price`"""

    @classmethod
    def of(cls, ln_price: np.ndarray, near: Tensor) -> Estimate:
        """From ln_price (m,) and the surroundings (m, 2, P, 4) as `compare` returns them."""
        columns = near.numpy().copy()
        # as differences, they tell a second model what the kernel does not already say
        columns[..., PRICE_COLUMNS] -= ln_price[:, None, None, None]
        return cls(ln_price, columns.reshape(len(columns), -1))


@dataclass
class KernelModel:
    similarity: Similarity
    rows: Features
    """the n fitted rows"""
    ln_price: Tensor
    """(n,) float32 of the fitted rows"""
    weights: Tensor
    """(n,) of the fitted rows in every prediction"""
    left_out: Estimate
    """of each fitted row by all others"""

    @classmethod
    def fit(
        cls, settings: WordModelSettings, rows: Features, ln_price: np.ndarray, *, max_rows: int = MAX_ROWS
    ) -> KernelModel:
        """Learn the similarity from `rows` and fit the regression to all of them, ln_price (n,).

        Raises:
            InputError: more than `max_rows` rows; the model holds matrices of all pairs.
        """
        if len(rows) > max_rows:
            raise InputError(
                f"--model {settings.model}: {len(rows)} rows to fit, but all pairs of rows are held in memory, which "
                f"is limited to {max_rows} rows; use --model mlp or lightgbm"
            )
        similarity = learn(settings, rows, ln_price)
        known = torch.from_numpy(ln_price).float()
        gram, near = compare(similarity, rows, rows, known, leave_out_self=True)
        inverse = torch.linalg.inv(similarity.with_noise(gram))
        weights = inverse @ (
            known - known.mean()
        )  # ridge regression without an intercept needs centred prices
        left_out_error = (weights / inverse.diagonal()).double().numpy()  # equation 5.12
        left_out = Estimate.of(ln_price - left_out_error, near)
        return cls(similarity, rows, known, weights, left_out)

    def estimate(self, asked: Features, *, rows_at_once: int = ROWS_AT_ONCE) -> Estimate:
        """What all fitted rows say of other rows."""
        gram, near = compare(self.similarity, asked, self.rows, self.ln_price, rows_at_once=rows_at_once)
        ln_price = self.ln_price.mean() + gram @ self.weights  # (m,)
        return Estimate.of(ln_price.double().numpy(), near)


@torch.no_grad()
def compare(
    similarity: Similarity,
    asked: Features,
    fit: Features,
    ln_price: Tensor,
    *,
    leave_out_self: bool = False,
    rows_at_once: int = ROWS_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """The kernel (m, n), and the surroundings (m, 2, P, 4) by everything and by words alone.

    Args:
        similarity: what was learned.
        asked: m rows.
        fit: n rows with their ln_price (n,).
        leave_out_self: the asked rows are the fitted ones, and none may see its own price in its surroundings.
        rows_at_once: asked rows that are compared together.
    """
    similarities = (similarity, similarity.of_words(len(fit.compared_columns)))
    fit_amount = torch.from_numpy(fit.amount)
    asked_amount = torch.from_numpy(asked.amount)
    grams = []
    near = []
    for slab in torch.arange(len(asked)).split(rows_at_once):
        compared = differences(asked[slab.numpy()], fit)  # (C, rows, n)
        grams.append(similarity(compared))
        by_similarity = []
        for one in similarities:
            log_similarity = one.log(compared)
            if leave_out_self:
                log_similarity[torch.arange(len(slab)), slab] = -torch.inf  # a weight of 0
            by_similarity.append(surroundings(log_similarity, ln_price, fit_amount, asked_amount[slab]))
        near.append(torch.stack(by_similarity, dim=1))  # (rows, 2, P, 4)
    return torch.cat(grams), torch.cat(near)
