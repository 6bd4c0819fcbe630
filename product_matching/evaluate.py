"""Score an encoder on labelled pairs: retrieval in the other catalogue, the pair decision, and the confidence.

    python -m product_matching.evaluate --pairs ../shared/data/matching/walmart_amazon \\
        --model checkpoints/product_matching/model --label "LoRA, seed 0" \\
        --out studies/results/product_matching_scores.csv
    python -m product_matching.evaluate --pairs catalogues --decision checkpoints/match_decision/decision

Queries are the left records of the split's matches, and the corpus is every right record. The threshold of the pair
decision is the best one on the validation pairs, whatever split is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, write_json
from product_matching.calibration import HIGH, Calibration
from product_matching.catalogue import product_text
from product_matching.config import EvaluateSettings
from product_matching.decide import candidate_rows
from product_matching.decision import DecisionModel, Records, f1_scores, rows_of
from product_matching.encoder import ENCODING_BATCH, encode, load_encoder
from product_matching.pairs import Pairs, read_pairs
from training.settings import parse_settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CALIBRATION_BINS = 10
"""Equal bins of the probability in the calibration error. The numbers of the README use ten."""
_LIBRARY_NAMES = {
    "recall_at_1": "cosine_accuracy@1",
    "recall_at_10": "cosine_accuracy@10",
    "mrr": "cosine_mrr@100",
    "ndcg_at_10": "cosine_ndcg@10",
}
"""Our name of each retrieval score, and the one that sentence-transformers gives it."""


@dataclass
class EmbeddedPairs:
    """Labelled pairs with the embeddings of both catalogues under one encoder."""

    pairs: Pairs
    left: np.ndarray
    """(N_left, D), rows of length 1, in the order of `pairs.left`"""
    right: np.ndarray
    """(N_right, D), rows of length 1, in the order of `pairs.right`"""

    @classmethod
    def of(
        cls, encoder: SentenceTransformer, pairs: Pairs, *, plain: bool = False, progress: bool = False
    ) -> EmbeddedPairs:
        left = encode(encoder, product_text(pairs.left, plain=plain), progress=progress)
        right = encode(encoder, product_text(pairs.right, plain=plain), progress=progress)
        return cls(pairs, left, right)

    def scores(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Cosine (n,) and label (n,) bool of the n labelled pairs of one split."""
        labelled = self.pairs.of(split)
        left_rows = pd.Index(self.pairs.left["id"]).get_indexer(labelled["left_id"])
        right_rows = pd.Index(self.pairs.right["id"]).get_indexer(labelled["right_id"])
        cosine = (self.left[left_rows] * self.right[right_rows]).sum(axis=1)
        return cosine, labelled["match"].to_numpy()


def retrieval(
    encoder: SentenceTransformer,
    pairs: Pairs,
    split: str,
    *,
    plain: bool = False,
    right: np.ndarray | None = None,
) -> dict[str, float]:
    """Recall@1, Recall@10, MRR over the first 100 and NDCG@10, by the evaluator of sentence-transformers.

    Recall@k is the share of queries with a match among the first k. (The library calls this accuracy@k: it differs
    from its recall@k only for the few queries with two matches.)

    Args:
        plain: score the fields as they are written (see `product_text`).
        right: (N_right, D) embeddings of `pairs.right`, if they exist already.

    Returns:
        The four scores, and the numbers of queries and of corpus records.

    Raises:
        InputError: the split has no matches.
    """
    import torch
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    matches = pairs.matches(split)
    if matches.empty:
        raise InputError(f"the {split} split has no matches")
    queries = pairs.left[pairs.left["id"].isin(matches["left_id"])]
    query_texts = product_text(queries, plain=plain)
    corpus_texts = product_text(pairs.right, plain=plain)
    if right is None:
        right = encode(encoder, corpus_texts)
    evaluator = InformationRetrievalEvaluator(
        queries=dict(zip(queries["id"], query_texts, strict=True)),
        corpus=dict(zip(pairs.right["id"], corpus_texts, strict=True)),
        relevant_docs=matches.groupby("left_id")["right_id"].agg(set).to_dict(),
        accuracy_at_k=[1, 10],
        mrr_at_k=[100],
        ndcg_at_k=[10],
        precision_recall_at_k=[1],  # not used, but the default computes more
        map_at_k=[1],
        batch_size=ENCODING_BATCH,
        write_csv=False,
        score_functions={"cosine": cos_sim},
    )
    # the library would encode the corpus itself, at the cost of doing it a second time
    values = evaluator(encoder, corpus_embeddings=torch.from_numpy(right).to(encoder.device))
    scores = {name: float(values[library_name]) for name, library_name in _LIBRARY_NAMES.items()}
    return {**scores, "queries": len(queries), "corpus": len(pairs.right)}


def pair_decision(embedded: EmbeddedPairs, split: str) -> dict[str, float]:
    """F1, precision and recall of "cosine ≥ threshold" on the split, at the threshold with the best validation F1."""
    from sentence_transformers.sentence_transformer.evaluation import BinaryClassificationEvaluator

    # the threshold is not chosen on the split that is scored
    cosine, match = embedded.scores("valid")
    _, _, _, threshold = BinaryClassificationEvaluator.find_best_f1_and_threshold(
        cosine, match, high_score_more_similar=True
    )
    cosine, match = embedded.scores(split)
    found = cosine >= threshold
    true_positives = (match & found).sum()
    return {
        "threshold": float(threshold),
        # max(1, …): a split without matches, or without pairs above the threshold, scores 0
        "f1": float(2 * true_positives / max(1, match.sum() + found.sum())),
        "precision": float(true_positives / max(1, found.sum())),
        "recall": float(true_positives / max(1, match.sum())),
    }


def confidence(embedded: EmbeddedPairs, split: str, calibration: Calibration) -> dict[str, float]:
    """How well the calibrated probability holds on the split.

    Returns:
        calibration_error: the expected calibration error (Naeini et al. 2015, "Obtaining well calibrated
            probabilities using Bayesian binning"), the mean gap between probability and share of matches in a bin.
        high_precision, high_recall: those of calling every pair of high confidence a match.
    """
    cosine, match = embedded.scores(split)
    return confidence_scores(calibration.probability(cosine), match)


def confidence_scores(probability: np.ndarray, match: np.ndarray) -> dict[str, float]:
    """The scores of `confidence` for the probability (n,) and label (n,) bool of n pairs."""
    bin_of_pair = (probability * CALIBRATION_BINS).astype(int)
    bin_of_pair = np.minimum(bin_of_pair, CALIBRATION_BINS - 1)  # probability 1 belongs to the last bin
    gap_of_pair = probability - match
    gaps = np.bincount(bin_of_pair, weights=gap_of_pair)  # within a bin, errors in both directions cancel
    high = probability > HIGH
    return {
        "calibration_error": float(np.abs(gaps).sum() / len(match)),
        "high_precision": float((match & high).sum() / max(1, high.sum())),
        "high_recall": float((match & high).sum() / max(1, match.sum())),
    }


def ranking_scores(relevant: np.ndarray, matches: np.ndarray) -> dict[str, float]:
    """The scores of `retrieval` for ranked candidates.

    Args:
        relevant: (queries, candidates) bool, which candidates are a match, the best candidate first.
        matches: (queries,) int, matches of each query in the whole corpus.
    """
    places = np.arange(1, relevant.shape[1] + 1)
    first = np.where(relevant.any(axis=1), relevant.argmax(axis=1) + 1.0, np.inf)
    discount = 1 / np.log2(places[:10] + 1)
    gain = (relevant[:, :10] * discount[: relevant.shape[1]]).sum(axis=1)
    ideal = np.array([discount[: min(count, 10)].sum() for count in matches.tolist()])
    return {
        "recall_at_1": float((first <= 1).mean()),
        "recall_at_10": float((first <= 10).mean()),
        "mrr": float((1 / first).mean()),
        "ndcg_at_10": float((gain / ideal).mean()),
    }


def evaluate_decision(
    decision: DecisionModel, pairs: Pairs, split: str = "test", *, candidates: int = 20
) -> dict[str, float]:
    """All scores of one split with a trained decision: retrieval after re-ranking, the pair decision, the confidence.

    Args:
        candidates: records per query that the first stage finds and the decision orders again.
    """
    left = decision.records(pairs.left)
    right = decision.records(pairs.right)
    rows, relevant, matches = query_candidates(pairs, left, right, split, candidates)
    probability = decision.decide(left, right, rows, progress=True).probability
    labelled = pairs.of(split)
    verdicts = decision.decide(
        left, right, rows_of(pairs.left["id"], pairs.right["id"], labelled), progress=True
    )
    match = labelled["match"].to_numpy(bool)
    return {
        **ranking_scores(reordered(relevant, probability), matches),
        "candidate_recall": float(relevant.any(axis=1).mean()),
        "queries": len(relevant),
        "corpus": len(pairs.right),
        "threshold": decision.threshold,
        **f1_scores(verdicts.match, match),
        **confidence_scores(verdicts.probability, match),
    }


def query_candidates(
    pairs: Pairs, left: Records, right: Records, split: str, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the first stage finds for the queries of a split.

    Returns:
        rows (queries · count, 2) int, places of the records of each candidate pair, query by query; relevant
        (queries, count) bool, which of them are a match; and the number of matches of each query.

    Raises:
        InputError: the split has no matches.
    """
    matches = pairs.matches(split)
    if matches.empty:
        raise InputError(f"the {split} split has no matches")
    matched = rows_of(pairs.left["id"], pairs.right["id"], matches)
    queries, matches_of_query = np.unique(matched[:, 0], return_counts=True)
    rows = candidate_rows(left.vectors[queries], right.vectors, count)
    rows[:, 0] = queries[rows[:, 0]]
    known = set(map(tuple, matched.tolist()))
    relevant = np.array([tuple(pair) in known for pair in rows.tolist()]).reshape(len(queries), -1)
    return rows, relevant, matches_of_query


def reordered(relevant: np.ndarray, score: np.ndarray) -> np.ndarray:
    """`relevant` (queries, candidates) with the candidates of each query in the order of their falling score."""
    order = np.argsort(-score.reshape(relevant.shape), axis=1, kind="stable")
    return np.take_along_axis(relevant, order, axis=1)


def evaluate(
    encoder: SentenceTransformer, pairs: Pairs, split: str = "test", *, plain: bool = False
) -> tuple[dict[str, float], Calibration]:
    """All scores of one split, and the calibration fitted to the validation pairs."""
    embedded = EmbeddedPairs.of(encoder, pairs, plain=plain, progress=True)
    calibration = Calibration.fit(*embedded.scores("valid"))
    scores = {
        **retrieval(encoder, pairs, split, plain=plain, right=embedded.right),
        **pair_decision(embedded, split),
        **confidence(embedded, split, calibration),
    }
    return scores, calibration


def add_row(path: Path, row: dict[str, object]) -> None:
    """Add `row` to a csv, in place of an older row with the same dataset, model and split."""
    # text, as `read_table` gives it: older rows stay as they were written
    table = pd.DataFrame([row]).astype(str)
    if path.is_file():
        older = read_table(path)
        same = pd.Series(True, index=older.index)
        for column in ("dataset", "model", "split"):
            same &= older[column] == row[column]
        table = pd.concat([older[~same], table], ignore_index=True).fillna("")
    with atomic_write(path) as file:
        table.to_csv(file, index=False)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(EvaluateSettings, argv, description="Score an encoder on labelled pairs.")
    pairs = read_pairs(settings.pairs)
    if settings.decision:
        if settings.calibration:
            raise InputError(
                "--calibration is of a cosine; a decision has its own, so leave one of the two out"
            )
        decision = DecisionModel.load(settings.decision, device=settings.device)
        scores = evaluate_decision(decision, pairs, settings.split, candidates=settings.candidates)
    else:
        encoder = load_encoder(settings.model, max_length=settings.max_length, device=settings.device)
        scores, calibration = evaluate(encoder, pairs, settings.split, plain=settings.plain_text)
    dataset = Path(settings.pairs).resolve().name
    label = settings.label or settings.decision or settings.model
    print(f"{dataset}, {settings.split}: {label}")
    for name, value in scores.items():
        written = f"{value:.4f}" if isinstance(value, float) else value
        print(f"  {name:26s} {written}")
    if settings.out:
        rounded = {name: round(value, 5) for name, value in scores.items()}
        add_row(Path(settings.out), {"dataset": dataset, "model": label, "split": settings.split, **rounded})
    if settings.calibration:
        write_json(settings.calibration, asdict(calibration))


if __name__ == "__main__":
    run_entry_point(main)
