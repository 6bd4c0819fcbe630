"""Neighbourhoods of a large catalogue: each is small enough for exact kernel ridge regression.

The rows are grouped into clusters by k-means. A cluster's neighbourhood holds its own rows, which are called *home*,
and the rows that lie nearest to the cluster's centre. A row is priced in the neighbourhood that it is at home in, and a
new row in the neighbourhood of the nearest centre. This is kriging with moving neighbourhoods (Chilès & Delfiner 2012,
"Geostatistics", chapter 3), with one neighbourhood per cluster instead of one per row: all rows of a cluster share
one inverse, so the work per row does not grow with the catalogue.

A small catalogue is a single neighbourhood in which every row is at home; the regression is exact then.

Legend: n rows, k centres, D width of a place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLUSTER_ROUNDS = 10
"""Iterations of k-means; its result barely changes after them."""
CENTRES_AT_ONCE = 64
"""Centres whose distances to all rows are held together. The number bounds memory and changes no result."""
ROWS_AT_ONCE = 4_096
"""Rows that are compared together with centres. It bounds memory as well."""


@dataclass(frozen=True)
class Sizes:
    """How large neighbourhoods are."""

    exact: int = 12_000
    """Up to this number of rows the regression is exact. It then holds three matrices of all pairs, 1.7 GB, and the
    inverse takes a time per row that grows with the square of the rows."""
    home: int = 400
    """Mean number of rows that are at home in a neighbourhood. Fewer rows lie nearer to the centre on average, but
    each neighbourhood costs one matrix of all its pairs."""
    members: int = 4_000
    """Rows of a neighbourhood, home included. Comparing all pairs of them takes most of the time."""

    def __post_init__(self) -> None:
        assert 0 < self.home < self.members


SIZES = Sizes()


@dataclass
class Neighbourhood:
    members: np.ndarray
    """positions of its rows in the catalogue; those at home come last"""
    home: int
    """how many of them are at home"""
    centre: np.ndarray | None
    """(D,) place around which new rows are priced here; None: another neighbourhood has the same centre"""


def neighbourhoods(places: np.ndarray, sizes: Sizes, seed: int) -> list[Neighbourhood]:
    """Neighbourhoods in which each row is at home once.

    Args:
        places: (n, D) float32; rows are as similar as their places are close.
        sizes: see `Sizes`.
        seed: of k-means.
    """
    count = len(places)
    if count <= sizes.exact:
        return [Neighbourhood(np.arange(count), home=count, centre=places.mean(axis=0))]

    centres = _centres(places, count // sizes.home, seed)
    home_of = nearest_centre(places, centres)
    found = []
    for some in np.array_split(np.arange(len(centres)), -(-len(centres) // CENTRES_AT_ONCE)):
        distances = _distances(places, centres[some])  # (n, centres)
        for at, distance in zip(some, distances.T, strict=True):
            home = np.flatnonzero(home_of == at)
            # many equal rows make a cluster too large for one neighbourhood: its parts share the centre
            parts = np.array_split(home, -(-len(home) // (sizes.members // 2)))
            for number, part in enumerate(parts):
                centre = centres[at] if number == 0 else None
                found.append(Neighbourhood(_members(distance, part, sizes), len(part), centre))
    return found


def nearest_centre(places: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(m, D) places and (k, D) centres → (m,) positions among the centres."""
    found = []
    for start in range(0, len(places), ROWS_AT_ONCE):
        distances = _distances(places[start : start + ROWS_AT_ONCE], centres)
        found.append(distances.argmin(axis=1))
    return np.concatenate(found)


def _members(distance: np.ndarray, home: np.ndarray, sizes: Sizes) -> np.ndarray:
    """The nearest other rows in the order of the catalogue, then those at home; distance is (n,) to the centre."""
    outside = distance.copy()
    outside[home] = np.inf
    wanted = min(sizes.members, len(distance)) - len(home)
    others = np.argpartition(outside, wanted - 1)[:wanted]
    return np.concatenate([np.sort(others), home])


def _distances(places: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances of places (m, D) and centres (k, D), (m, k) float64.

    In float64, so that rounding does not depend on which places are asked together.
    """
    wide = centres.astype(np.float64)
    found = []
    for start in range(0, len(places), ROWS_AT_ONCE):
        some = places[start : start + ROWS_AT_ONCE].astype(np.float64)
        squares = np.square(some).sum(axis=1)[:, None] + np.square(wide).sum(axis=1)
        found.append(squares - 2 * some @ wide.T)
    return np.concatenate(found)


def _centres(places: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(k, D) centres of k-means, those without a row left out."""
    import faiss

    kmeans = faiss.Kmeans(places.shape[1], count, niter=CLUSTER_ROUNDS, seed=seed, min_points_per_centroid=1)
    kmeans.train(places)
    centres = np.asarray(kmeans.centroids)
    return centres[np.unique(nearest_centre(places, centres))]
