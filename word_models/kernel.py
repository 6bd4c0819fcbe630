"""Kernel ridge regression: a product costs what similar products of similar amounts cost.

`word_models.similarity` says what is similar. The exact form inverts one matrix of all pairs of fitted rows. Beyond
`Sizes.exact` rows, the rows are cut into neighbourhoods of at most `Sizes.members` rows, and each is an exact
regression of its own: leave-one-out stays closed, and time per row stays flat (`word_models.neighbourhoods` says how
they are chosen). The similarity and the mean price are those of all rows.

A second model learns where this one errs, from its prices and from what similar products cost (`Estimate`).

Legend: n fitted rows, m asked rows, C comparisons (blocks, views, amounts), P powers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from contracts.errors import InputError
from contracts.files import atomic_write, read_versioned, write_json
from word_models.compared import ComparedRows
from word_models.config import WordModelSettings
from word_models.features import Features
from word_models.neighbourhoods import SIZES, Sizes, nearest_centre, neighbourhoods
from word_models.similarity import Similarity, learn, places
from word_models.surroundings import COLUMNS, POWERS, PRICE_COLUMNS, surroundings

SCHEMA = 1
"""Version of the saved files."""
PLACES = 2
"""Version of `similarity.places`. It matters only where there are several neighbourhoods to choose from."""

ROWS_AT_ONCE = 512
"""Asked rows that are compared together with all fitted rows. The number bounds memory and changes no result."""


SMALLEST = torch.finfo(torch.float32).tiny
"""Least similarity in the surroundings, in float64 as in float32: fitted and asked rows must be described alike."""


@dataclass
class Estimate:
    """What the kernel says of m rows. Fitted rows are estimated from the other fitted rows alone."""

    ln_price: np.ndarray
    """(m,) float64"""
    surroundings: np.ndarray
    """(m, 8 P): the columns of `word_models.surroundings`, first by the similarity of everything, then by that
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
    rows: ComparedRows
    """the n fitted rows"""
    ln_price: Tensor
    """(n,) float32 of the fitted rows"""
    centres: np.ndarray
    """(k, D) places: a new row is priced in the neighbourhood of the nearest one"""
    members: list[np.ndarray]
    """positions of the rows of each neighbourhood, k arrays"""
    weights: list[Tensor]
    """of the rows of each neighbourhood in every prediction, k tensors"""
    left_out: Estimate
    """of each fitted row by all others of the neighbourhood that it is at home in"""

    @classmethod
    def fit(
        cls, settings: WordModelSettings, rows: Features, ln_price: np.ndarray, *, sizes: Sizes = SIZES
    ) -> KernelModel:
        """Learn the similarity from `rows` and fit the regression to all of them, ln_price (n,)."""
        compared = ComparedRows.of(rows)
        similarity = learn(settings, compared, ln_price)
        return cls.with_similarity(similarity, compared, ln_price, sizes=sizes, seed=settings.seed)

    @classmethod
    def with_similarity(
        cls, similarity: Similarity, compared: ComparedRows, ln_price: np.ndarray, *, sizes: Sizes, seed: int
    ) -> KernelModel:
        """Fit the regression alone; `seed` is that of the neighbourhoods."""
        count = len(compared)
        known = torch.from_numpy(ln_price).float()
        found = neighbourhoods(places(similarity, compared), sizes, seed)

        centres = []
        members = []
        weights = []
        # every row is at home once; NaN would show one that is not
        left_out_error = torch.full((count,), torch.nan)
        near = torch.full((count, 2, len(POWERS), len(COLUMNS)), torch.nan)
        for neighbourhood in tqdm(found, desc="neighbourhoods", leave=False, disable=len(found) == 1):
            here = neighbourhood.members
            at_home = here[-neighbourhood.home :]
            fit = _fit_exactly if len(at_home) == count else _fit_neighbourhood
            of_here, left_out_error[at_home], near[at_home] = fit(
                similarity, compared[here], known[here], known.mean(), neighbourhood.home
            )
            if neighbourhood.centre is not None:
                centres.append(neighbourhood.centre)
                members.append(here)
                weights.append(of_here)
        left_out = Estimate.of(ln_price - left_out_error.double().numpy(), near)
        return cls(similarity, compared, known, np.stack(centres), members, weights, left_out)

    def estimate(self, asked: Features, *, rows_at_once: int = ROWS_AT_ONCE) -> Estimate:
        """What the fitted rows say of other rows, each in the neighbourhood whose centre is nearest.

        In float64: in float32 the sums depend slightly on which rows are asked together, and a tree that reads them
        could then take another branch.
        """
        compared = ComparedRows.of(asked)
        nearest = nearest_centre(places(self.similarity, compared), self.centres)
        similarity = self.similarity.double()
        ln_price = np.empty(len(asked))
        near = torch.empty(len(asked), 2, len(POWERS), len(COLUMNS), dtype=torch.float64)
        for at in np.unique(nearest):
            here = np.flatnonzero(nearest == at)
            known = self.ln_price[self.members[at]].double()
            gram, near[here] = compare(
                similarity, compared[here].double(), self._members(at), known, rows_at_once=rows_at_once
            )
            ln_price[here] = float(self.ln_price.mean()) + (gram @ self.weights[at].double()).numpy()
        return Estimate.of(ln_price, near)

    def _members(self, at: int) -> ComparedRows:
        """The rows of a neighbourhood in float64."""
        return self._all_rows if len(self.members) == 1 else self.rows[self.members[at]].double()

    @cached_property
    def _all_rows(self) -> ComparedRows:
        """The fitted rows in float64, kept so that single products need not wait for them."""
        return self.rows.double()

    def arrays(self) -> dict[str, np.ndarray]:
        """All but the fitted rows as named arrays, which `from_arrays` takes."""
        return {
            "ln_price": self.ln_price.numpy(),
            "rate": self.similarity.rate.numpy(),
            "scale": self.similarity.scale.numpy(),
            "noise": self.similarity.noise.numpy(),
            "centres": self.centres,
            "members": np.concatenate(self.members),
            "weights": torch.cat(self.weights).numpy(),
            "member_counts": np.array([len(members) for members in self.members]),
            "left_out_ln_price": self.left_out.ln_price,
            "left_out_surroundings": self.left_out.surroundings,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], rows: ComparedRows) -> KernelModel:
        """The model of the fitted `rows` whose `arrays` are given."""
        counts = arrays["member_counts"].tolist()
        return cls(
            Similarity(*(torch.from_numpy(arrays[name]) for name in ("rate", "scale", "noise"))),
            rows,
            torch.from_numpy(arrays["ln_price"]),
            arrays["centres"],
            np.split(arrays["members"], np.cumsum(counts)[:-1]),
            list(torch.from_numpy(arrays["weights"]).split(counts)),
            Estimate(arrays["left_out_ln_price"], arrays["left_out_surroundings"]),
        )

    def save(self, folder: Path) -> None:
        """Write kernel.npz and kernel.json into `folder`."""
        arrays: dict[str, Any] = self.rows.arrays() | self.arrays()
        with atomic_write(folder / "kernel.npz", "wb") as file:
            np.savez(file, **arrays)
        content = {
            "schema": SCHEMA,
            "rows": len(self.rows),
            "blocks": len(self.rows.words),
            "views": len(self.rows.views),
            "amounts": list(self.rows.amounts),
            "places": PLACES,
        }
        write_json(folder / "kernel.json", content)

    @classmethod
    def load(cls, folder: Path) -> KernelModel:
        """The model that `save` wrote.

        Raises:
            InputError: a file is absent or damaged, or was written by another version.
        """
        content = read_versioned(folder / "kernel.json", SCHEMA, "fit the model again")
        arrays = read_arrays(folder / "kernel.npz")
        if len(arrays["member_counts"]) > 1 and content.get("places") != PLACES:
            raise InputError(
                f"{folder}/kernel.json: neighbourhoods of an earlier version, to which this one cannot assign rows; "
                "fit the model again"
            )
        rows = ComparedRows.from_arrays(
            arrays, blocks=content["blocks"], views=content["views"], amounts=content["amounts"]
        )
        return cls.from_arrays(arrays, rows)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Raises InputError if the file is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise InputError(f"{path}: not readable ({error}); fit the model again") from None


def _fit_exactly(
    similarity: Similarity, rows: ComparedRows, ln_price: Tensor, mean: Tensor, home: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_fit_neighbourhood`, for a single neighbourhood that is home to all n rows."""
    gram, near = compare(similarity, rows, rows, ln_price, first_self=0)
    inverse = torch.linalg.inv(similarity.with_noise(gram))
    weights = inverse @ (ln_price - mean)
    return weights, weights / inverse.diagonal(), near  # equation 5.12


@torch.no_grad()
def _fit_neighbourhood(
    similarity: Similarity, rows: ComparedRows, ln_price: Tensor, mean: Tensor, home: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel ridge regression on the n rows of a neighbourhood, of which the last `home` ones are at home.

    It does what `_fit_exactly` does in half the time, because only the rows at home are left out.

    Returns:
        The weights (n,) of the rows, and of the rows at home the leave-one-out errors (home,) and the surroundings.
    """
    first = len(rows) - home
    gram = torch.zeros(len(rows), len(rows))
    # the factorisation reads only the lower triangle, so slabs end at the diagonal
    for slab in np.array_split(np.arange(first), -(-first // ROWS_AT_ONCE)):
        seen = np.arange(slab[-1] + 1)
        gram[slab[0] : slab[-1] + 1, : len(seen)] = similarity(rows[slab].differences(rows[seen]))
    at_home = rows[np.arange(first, len(rows))]
    gram[first:], near = compare(similarity, at_home, rows, ln_price, first_self=first)

    lower = torch.linalg.cholesky(similarity.with_noise(gram))
    # ridge regression without an intercept needs centred prices
    weights = torch.cholesky_solve((ln_price - mean)[:, None], lower)[:, 0]
    # the last rows and columns of the inverse are the inverse of the factor's last block times its transpose
    block_inverse = torch.linalg.solve_triangular(lower[first:, first:], torch.eye(home), upper=False)
    diagonal = block_inverse.square().sum(dim=0)
    return weights, weights[first:] / diagonal, near  # equation 5.12


@torch.no_grad()
def compare(
    similarity: Similarity,
    asked: ComparedRows,
    fit: ComparedRows,
    ln_price: Tensor,
    *,
    first_self: int | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """The kernel (m, n), and the surroundings (m, 2, P, 4) by everything and by words alone.

    Args:
        similarity: what was learned.
        asked: m rows, whose precision the result has.
        fit: n rows with their ln_price (n,), of the same precision.
        first_self: position of the first asked row among the fitted rows, if the asked rows are fitted rows in the same
            order; none of them may see its own price in its surroundings.
        rows_at_once: asked rows that are compared together.
    """
    without_amounts = fit.comparisons - len(fit.amounts)
    of_words = similarity.of_first(without_amounts)
    fit_amount = torch.from_numpy(fit.amount).to(ln_price.dtype)
    asked_amount = torch.from_numpy(asked.amount)
    grams = []
    near = []
    for slab in torch.arange(len(asked)).split(rows_at_once):
        compared = asked[slab.numpy()].differences(fit)  # (C, rows, n)
        gram = similarity(compared)
        grams.append(gram)
        by_similarity = []
        for similar in (gram, of_words(compared[:without_amounts])):
            # a row unlike all others is as near to each of them, and not to none
            similar = similar.clamp(min=SMALLEST)
            if first_self is not None:
                similar[torch.arange(len(slab)), first_self + slab] = 0
            by_similarity.append(surroundings(similar, ln_price, fit_amount, asked_amount[slab]))
        near.append(torch.stack(by_similarity, dim=1))  # (rows, 2, P, 4)
    return torch.cat(grams), torch.cat(near)
