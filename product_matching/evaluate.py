"""Score an encoder on labelled pairs: retrieval in the other catalogue, the pair decision, and the confidence.

    python -m product_matching.evaluate --pairs ../shared/data/matching/walmart_amazon \\
        --model checkpoints/product_matching/model --label "LoRA, seed 0" \\
        --out studies/results/product_matching_scores.csv

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
    probability = calibration.probability(cosine)
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
    encoder = load_encoder(settings.model, max_length=settings.max_length, device=settings.device)
    scores, calibration = evaluate(encoder, pairs, settings.split, plain=settings.plain_text)
    dataset = Path(settings.pairs).resolve().name
    label = settings.label or settings.model
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
