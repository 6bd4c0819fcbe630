"""Whole catalogues: each record matched at most once, and groups of duplicates within one catalogue.

Both take candidate pairs with their match probability. n pairs; `rows` (n, 2) holds the places of their records.
"""

from __future__ import annotations

import numpy as np

from contracts.errors import InputError

MOST_CELLS = 25_000_000
"""Left records times right records of one component that the assignment solves at once: 200 MB as float64."""


def greedy(rows: np.ndarray, probability: np.ndarray, threshold: float) -> np.ndarray:
    """(n,) bool: the most probable candidate of each left record, where it is at least `threshold` probable.

    Several left records may choose one right record.
    """
    chosen = np.zeros(len(rows), bool)
    taken: set[int] = set()
    for pair in np.argsort(-probability, kind="stable").tolist():
        left = int(rows[pair, 0])
        if left not in taken and probability[pair] >= threshold:
            taken.add(left)
            chosen[pair] = True
    return chosen


def one_to_one(rows: np.ndarray, probability: np.ndarray, threshold: float) -> np.ndarray:
    """(n,) bool: the pairs that match each record at most once and have the largest sum of log odds together.

    Only pairs of at least `threshold` are considered, and their log odds count from those of the threshold. So a pair
    that is barely a match gives way to a sure one, and no record is matched for the sake of another's match.
    The linear assignment problem (Kuhn 1955) is solved for each connected component by itself.

    Raises:
        InputError: a component is too large; a higher threshold takes it apart.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    chosen = np.zeros(len(rows), bool)
    pairs = np.flatnonzero(probability >= threshold)
    if len(pairs) == 0:
        return chosen
    gain = (
        _log_odds(probability[pairs]) - _log_odds(np.array(threshold)) + 1e-6
    )  # a pair at the threshold counts, too
    _, left = np.unique(rows[pairs, 0], return_inverse=True)
    _, right = np.unique(rows[pairs, 1], return_inverse=True)
    lefts = left.max() + 1
    vertices = lefts + right.max() + 1
    graph = coo_matrix((np.ones(len(pairs)), (left, lefts + right)), shape=(vertices, vertices))
    component = connected_components(graph, directed=False)[1][left]

    by_component = np.argsort(component, kind="stable")
    starts = np.flatnonzero(np.diff(component[by_component])) + 1
    for members in np.split(by_component, starts):
        _, own_left = np.unique(left[members], return_inverse=True)
        _, own_right = np.unique(right[members], return_inverse=True)
        shape = (own_left.max() + 1, own_right.max() + 1)
        if shape[0] * shape[1] > MOST_CELLS:
            raise InputError(
                f"{shape[0]} and {shape[1]} records are joined by pairs above {threshold:.3f}, too many to assign at "
                "once; use fewer --candidates"
            )
        # a record without a gain stays alone: a cell of 0 is as good as no match
        gains = np.zeros(shape)
        pair_of_cell = np.full(shape, -1)
        gains[own_left, own_right] = gain[members]
        pair_of_cell[own_left, own_right] = pairs[members]
        solved = linear_sum_assignment(gains, maximize=True)
        assigned = pair_of_cell[solved]
        chosen[assigned[assigned >= 0]] = True
    return chosen


def _log_odds(probability: np.ndarray) -> np.ndarray:
    clipped = np.clip(probability, 1e-9, 1 - 1e-9)
    return np.log(clipped / (1 - clipped))


def duplicate_groups(
    records: int, rows: np.ndarray, probability: np.ndarray, threshold: float, most: int
) -> tuple[np.ndarray, int]:
    """Groups of records that are one product: connected components, the most probable pairs joined first.

    One wrong pair joins two products, and a chain of them would join a catalogue. So a pair that would make a group of
    more than `most` records is not joined.

    Returns:
        group (records,) int, numbered from 0 in the order of the first records; and the number of pairs not joined.
    """
    parent = list(range(records))
    size = [1] * records

    def root_of(record: int) -> int:
        while parent[record] != record:
            parent[record] = parent[parent[record]]  # halves the path for later look-ups
            record = parent[record]
        return record

    refused = 0
    for pair in np.argsort(-probability, kind="stable").tolist():
        if probability[pair] < threshold:
            break
        one = root_of(int(rows[pair, 0]))
        other = root_of(int(rows[pair, 1]))
        if one == other:
            continue
        if size[one] + size[other] > most:
            refused += 1
            continue
        parent[other] = one
        size[one] += size[other]
    roots = np.array([root_of(record) for record in range(records)], int)
    _, first, inverse = np.unique(roots, return_index=True, return_inverse=True)
    rank = np.argsort(
        np.argsort(first)
    )  # np.unique numbers the groups by root, we number them by first record
    return rank[inverse], refused
