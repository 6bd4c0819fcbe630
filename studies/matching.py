"""Matching on public pairs: which evidence finds the product, and which decides whether it is the same.

    make match-study PAIRS=../shared/data/matching MATCH_SETS="walmart_amazon abt_buy" MATCH_MODEL=<encoder>
    python -m studies.matching --pairs PAIRS --sets walmart_amazon --model <encoder> --no-tune --no-cross-encoder

For every set and seed it trains the first stage (product_matching.train) and the decision
(product_matching.train_decision) with their defaults, and scores the test split with each kind of evidence alone and
with all of it. Weights and threshold of each row come from the validation pairs. It writes one row per set, seed and
kind of evidence, and prints the means.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from contracts.errors import run_entry_point
from contracts.files import atomic_write
from contracts.workspace import REPOSITORY
from studies.tables import RESULTS, spread
from training.settings import parse_settings

if TYPE_CHECKING:
    from product_matching.decision import DecisionModel, Evidence
    from product_matching.pairs import Pairs

PUBLISHED = {"walmart_amazon": 86.8, "abt_buy": 89.3}
"""Pair F1 that Ditto (Li et al. 2020, https://arxiv.org/abs/2004.00584) reports. It tunes nothing here."""
COSINE = "bi-encoder"
FEATURES = "features"
QUICK = "features and bi-encoder"
CROSS = "cross-encoder"
ALL = "all"
KINDS = {COSINE: ("cosine",), FEATURES: ("trees",), QUICK: ("trees", "cosine"), CROSS: ("cross",)}
"""Kinds of evidence of each row of the table; the row `all` is the decision as it is used."""
SCORES = ("recall_at_1", "recall_at_10", "mrr", "f1", "precision", "recall")


@dataclass
class StudySettings:
    pairs: Path = Path("pairs")
    """Folder with one folder of labelled pairs per set."""
    sets: tuple[str, ...] = ("walmart_amazon", "abt_buy")
    """Folders below --pairs."""
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Encoder that both stages start from: hub id or local folder."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of both stages."""
    tune: bool = True
    """Tune the first stage before the decision is trained; otherwise the encoder is used as it is."""
    cross_encoder: bool = True
    """Train the cross-encoder, too."""
    candidates: int = 20
    """Records per query that are ordered again."""
    workspace: Path = REPOSITORY
    """Folder for the runs."""
    out: Path = RESULTS / "matching_decision.csv"
    """Table to write."""
    resume: bool = True
    """Keep the runs that an earlier call has finished."""


def train_stages(settings: StudySettings, name: str, seed: int) -> Path:
    """Train the first stage, if it is to be tuned, and the decision. Returns the folder of the decision."""
    from product_matching import train, train_decision

    stem = "".join(letter if letter.isalnum() else "_" for letter in name)
    common = ["--pairs", str(settings.pairs / name), "--model", settings.model]
    common += ["--workspace", str(settings.workspace), "--seed", str(seed)]
    if settings.resume:
        common.append("--resume")
    encoder = settings.model
    if settings.tune:
        encoder = str(train.main([*common, "--run", f"match_{stem}_{seed}"]))
    run = f"match_{stem}_decision_{'tuned_' if settings.tune else ''}{seed}"
    flags = ["--run", run, "--encoder", encoder]
    if not settings.cross_encoder:
        flags.append("--no-cross-encoder")
    return train_decision.main([*common, *flags])


def score(model: DecisionModel, pairs: Pairs, settings: StudySettings) -> list[dict[str, Any]]:
    """One row of test scores for each kind of evidence, and for all of it as it is used."""
    from product_matching.decision import Combination, best_threshold, f1_scores, rows_of
    from product_matching.evaluate import query_candidates, ranking_scores, reordered
    from product_matching.features import edit_similarity

    left = model.records(pairs.left)
    right = model.records(pairs.right)
    rows = {}
    match = {}
    for split in ("valid", "test"):
        labelled = pairs.of(split)
        rows[split] = rows_of(pairs.left["id"], pairs.right["id"], labelled)
        match[split] = labelled["match"].to_numpy(bool)
    candidates, relevant, matches = query_candidates(pairs, left, right, "test", settings.candidates)

    with_cross = model.cross_encoder is not None
    evidence = {}
    for split in rows:
        # to score the cross-encoder alone, it has to read all pairs
        every = np.ones(len(rows[split]), bool) if with_cross else None
        evidence[split] = model.evidence(left, right, rows[split], read=every, progress=True)
    of_candidates = model.evidence(left, right, candidates, progress=True)

    table = []
    for name, kinds in KINDS.items():
        if "cross" in kinds and not with_cross:
            continue
        combination = Combination.fit(_stacked(evidence["valid"], kinds), match["valid"])
        threshold = best_threshold(
            combination.probability(_stacked(evidence["valid"], kinds)), match["valid"]
        )
        found = combination.probability(_stacked(evidence["test"], kinds)) >= threshold
        row: dict[str, Any] = {"evidence": name, **f1_scores(found, match["test"])}
        if "cross" not in kinds:  # which has not read all candidates
            order = reordered(relevant, combination.probability(_stacked(of_candidates, kinds)))
            row |= ranking_scores(order, matches)
        table.append(row)

    edit_similarity.cache_clear()  # it remembers the codes of the rows above
    started = time.perf_counter()
    verdicts = model.decide(left, right, rows["test"])
    seconds = time.perf_counter() - started
    order = reordered(relevant, model.probability(of_candidates))
    table.append(
        {
            "evidence": ALL,
            **f1_scores(verdicts.match, match["test"]),
            **ranking_scores(order, matches),
            "candidate_recall": float(relevant.any(axis=1).mean()),
            "read_by_cross_encoder": float((~np.isnan(verdicts.evidence.cross)).mean()),
            "pairs_per_second": len(rows["test"]) / seconds,
        }
    )
    return table


def _stacked(evidence: Evidence, kinds: Sequence[str]) -> np.ndarray:
    return np.stack([getattr(evidence, kind) for kind in kinds], axis=1)


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample standard deviation over the seeds, as text, one row per set and kind of evidence."""
    rows = []
    for (name, evidence), runs in table.groupby(["dataset", "evidence"], sort=False):
        row = {"dataset": name, "evidence": evidence, "seeds": len(runs)}
        for column in SCORES:
            values = runs[column].dropna()
            percent = 100 if column in ("f1", "precision", "recall") else 1
            digits = 1 if percent == 100 else 3
            row[column] = ""
            if len(values):
                mean = percent * values.mean()
                row[column] = f"{mean:.{digits}f} ± {percent * spread(values.to_numpy()):.{digits}f}"
        rows.append(row)
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    settings = parse_settings(StudySettings, argv, description="Retrieval and decision on public pairs.")
    from product_matching.decision import DecisionModel
    from product_matching.pairs import read_pairs

    # a folder is often just called "model"
    described = {"model": "/".join(Path(settings.model).parts[-2:]), "tuned": settings.tune}
    table = []
    for name in settings.sets:
        pairs = read_pairs(settings.pairs / name)
        for seed in settings.seeds:
            folder = train_stages(settings, name, seed)
            for row in score(DecisionModel.load(folder), pairs, settings):
                table.append({"dataset": name, **described, "seed": seed, **row})
            _write(settings.out, pd.DataFrame(table))  # an interrupted study has written what it knows
    frame = pd.DataFrame(table)
    print(means(frame).to_string(index=False))
    for name in settings.sets:
        if name in PUBLISHED:
            print(f"{name}: Ditto reports an F1 of {PUBLISHED[name]}")
    print(f"→ {settings.out}")
    return frame


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as file:
        table.to_csv(file, index=False, float_format="%.5f")


if __name__ == "__main__":
    run_entry_point(main)
