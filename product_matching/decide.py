"""Decide which records are one product: labelled pairs, two catalogues, or duplicates within one.

    python -m product_matching.decide --model checkpoints/match_decision/decision --pairs catalogues --split test
    python -m product_matching.decide --model … --left shop_a.csv --right shop_b.csv --one-to-one --explain 20
    python -m product_matching.decide --model … --left shop_a.csv              # duplicates

Writes one row per compared pair: left_id, right_id, cosine, probability, match (0 or 1), confidence and, for the pairs
that --explain covers, why. For duplicates, <out>.groups.csv gives the group of each record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contracts.errors import run_entry_point
from contracts.files import atomic_write
from product_matching.catalogue import read_catalogue
from product_matching.config import DecideSettings
from product_matching.pairs import read_pairs
from product_matching.resolve import duplicate_groups, greedy, one_to_one
from training.settings import parse_settings

if TYPE_CHECKING:
    from product_matching.decision import DecisionModel, Records, Verdicts


def candidate_rows(left: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    """The `count` records of `right` (fewer if there are fewer) most similar to each record of `left`: (n, 2) int.

    Args:
        left, right: embeddings (N_left, D) and (N_right, D) float32, rows of length 1.
    """
    import faiss

    index = faiss.IndexFlatIP(right.shape[1])
    index.add(np.ascontiguousarray(right))
    _, found = index.search(np.ascontiguousarray(left), min(count, len(right)))
    return np.stack([np.repeat(np.arange(len(left)), found.shape[1]), found.ravel()], axis=1)


def duplicate_candidates(vectors: np.ndarray, count: int) -> np.ndarray:
    """Pairs within one catalogue: each record with the `count` most similar others, every pair once, (n, 2) int."""
    rows = candidate_rows(vectors, vectors, count + 1)  # a record is among its own nearest
    rows = np.sort(rows[rows[:, 0] != rows[:, 1]], axis=1)
    return np.unique(rows, axis=0)


def decision_table(left: Records, right: Records, rows: np.ndarray, verdicts: Verdicts) -> pd.DataFrame:
    """The decisions as they are written: one row per pair, in the order of `rows`."""
    return pd.DataFrame(
        {
            "left_id": left.table["id"].to_numpy()[rows[:, 0]],
            "right_id": right.table["id"].to_numpy()[rows[:, 1]],
            "cosine": verdicts.evidence.cosine.round(4),
            "probability": verdicts.probability.round(4),
            "match": verdicts.match.astype(int),
            "confidence": verdicts.confidence(),
            "why": "",
        }
    )


def add_reasons(
    table: pd.DataFrame, model: DecisionModel, left: Records, right: Records, rows: np.ndarray, count: int
) -> None:
    """Fill in the column `why` of the `count` most probable pairs."""
    from tqdm import tqdm

    from product_matching.explain import explain, in_words

    order = np.argsort(-table["probability"].to_numpy(), kind="stable")[:count]
    for pair in tqdm(order.tolist(), desc="explanations", disable=None):
        one = left.table.iloc[rows[pair, 0]].to_dict()
        other = right.table.iloc[rows[pair, 1]].to_dict()
        table.loc[pair, "why"] = in_words(explain(model, one, other))


def decide(settings: DecideSettings) -> pd.DataFrame:
    """Decide, write the table and return it."""
    from product_matching.decision import DecisionModel, f1_scores, rows_of

    labels = None
    if settings.pairs:
        pairs = read_pairs(settings.pairs).only(settings.split)
        left_table, right_table = pairs.left, pairs.right
        labels = pairs.labelled["match"].to_numpy(bool)
    else:
        left_table = read_catalogue(settings.left)
        right_table = read_catalogue(settings.right) if settings.right else left_table
    model = DecisionModel.load(settings.model, device=settings.device)
    left = model.records(left_table)
    right = model.records(right_table) if right_table is not left_table else left
    if settings.pairs:
        rows = rows_of(left.table["id"], right.table["id"], pairs.labelled)
    elif settings.right:
        rows = candidate_rows(left.vectors, right.vectors, settings.candidates)
    else:
        rows = duplicate_candidates(left.vectors, settings.candidates)

    verdicts = model.decide(left, right, rows, progress=True)
    if labels is not None:
        choices = {
            "each pair": verdicts.match,
            "best of each left": greedy(rows, verdicts.probability, model.threshold),
            "one to one": one_to_one(rows, verdicts.probability, model.threshold),
        }
        for name, found in choices.items():
            scores = f1_scores(found, labels)
            print(f"{name:18s}" + "".join(f"  {score} {value:.3f}" for score, value in scores.items()))
    if settings.one_to_one:
        verdicts.match = one_to_one(rows, verdicts.probability, model.threshold)
    table = decision_table(left, right, rows, verdicts)
    if settings.explain:
        add_reasons(table, model, left, right, rows, settings.explain)
    _write(Path(settings.out), table)
    print(f"{len(table)} pairs, {verdicts.match.sum()} matches → {settings.out}")
    if right is left:
        _write_groups(settings, model.threshold, left, rows, verdicts)
    if settings.log:
        from product_matching.monitor import log_decisions

        log_decisions(settings.log, left, right, rows, verdicts, model)
    return table


def _write_groups(
    settings: DecideSettings, threshold: float, records: Records, rows: np.ndarray, verdicts: Verdicts
) -> None:
    group, refused = duplicate_groups(len(records), rows, verdicts.probability, threshold, settings.max_group)
    path = Path(settings.out).with_suffix(".groups.csv")
    _write(path, pd.DataFrame({"id": records.table["id"], "group": group}))
    left_out = (
        f"; {refused} pairs would have made a group of more than {settings.max_group}" if refused else ""
    )
    print(f"{len(records)} records are {group.max() + 1} products{left_out} → {path}")


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as file:
        table.to_csv(file, index=False)


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    return decide(parse_settings(DecideSettings, argv, description="Decide which records are one product."))


if __name__ == "__main__":
    run_entry_point(main)
