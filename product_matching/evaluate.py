"""Score an encoder on labelled pairs: retrieval in the other catalogue, and the pair decision.

    python -m product_matching.evaluate --pairs ../shared/data/matching/walmart_amazon \\
        --model checkpoints/product_matching/model --name "LoRA, seed 0" \\
        --out studies/results/product_matching_walmart.csv

Queries are the left records of the split's matches, the corpus is every right record. The pair threshold is
the best one on the validation pairs, whatever split is scored.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, write_json
from product_matching.catalogue import product_text
from product_matching.config import EvaluateSettings
from product_matching.encoder import encode, load_encoder
from product_matching.pairs import Pairs, read_pairs
from training.settings import parse_settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

HIGH, MEDIUM = 0.85, 0.75
"""Match probabilities above which a confidence is called high and medium."""


@dataclass(frozen=True)
class Calibration:
    """Match probability of a cosine, as a logistic curve fitted to labelled pairs (Platt 1999)."""

    slope: float
    intercept: float
    pairs: int
    """labelled pairs it was fitted to"""

    @classmethod
    def fit(cls, cosine: np.ndarray, match: np.ndarray) -> Calibration:
        """A curve that would fall is laid flat at the share of matches: that encoder's cosine says nothing.

        Raises InputError when all pairs have one label.
        """
        from sklearn.linear_model import LogisticRegression

        if match.all() or not match.any():
            raise InputError("calibration needs validation pairs that match and pairs that do not")
        # nearly without a penalty: the default shrinks the slope of a feature that spans less than 1
        fitted = LogisticRegression(C=1e6, max_iter=1000).fit(cosine[:, None], match)
        slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
        if slope <= 0:
            slope, intercept = 0.0, float(np.log(match.mean() / (1 - match.mean())))
        return cls(slope, intercept, len(match))

    def probability(self, cosine: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(self.slope * np.asarray(cosine, np.float64) + self.intercept)))

    @staticmethod
    def band(probability: float) -> str:
        return "high" if probability > HIGH else "medium" if probability > MEDIUM else "low"


@dataclass
class EmbeddedPairs:
    """The two catalogues of `pairs` under one encoder; everything that is scored comes from these."""

    pairs: Pairs
    left: np.ndarray
    """(N_left, D), rows of length 1, as `pairs.left`"""
    right: np.ndarray
    """(N_right, D), as `pairs.right`"""

    @classmethod
    def of(
        cls, encoder: SentenceTransformer, pairs: Pairs, *, plain: bool = False, progress: bool = False
    ) -> EmbeddedPairs:
        left, right = (
            encode(encoder, product_text(side, plain=plain), progress=progress)
            for side in (pairs.left, pairs.right)
        )
        return cls(pairs, left, right)

    def scores(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Cosine (n,) and match (n,) bool of the split's labelled pairs."""
        labelled = self.pairs.of(split)
        left_row = pd.Index(self.pairs.left["id"]).get_indexer(labelled["left_id"])
        right_row = pd.Index(self.pairs.right["id"]).get_indexer(labelled["right_id"])
        return (self.left[left_row] * self.right[right_row]).sum(axis=1), labelled["match"].to_numpy()


def retrieval(
    encoder: SentenceTransformer,
    pairs: Pairs,
    split: str,
    *,
    plain: bool = False,
    right: np.ndarray | None = None,
) -> dict[str, float]:
    """Recall@1, Recall@10, MRR (first 100) and NDCG@10 of the split's matches, by the library's evaluator.

    Queries are the left records of the split's matches, the corpus is every right record. Recall@k is the share
    of queries with a match among the first k: a query has one match, rarely two.

    Args:
        right: (N_right, D) embeddings of `pairs.right` where they are at hand.
    """
    import torch
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    matches = pairs.matches(split)
    if matches.empty:
        raise InputError(f"the {split} split has no matches")
    if right is None:
        right = encode(encoder, product_text(pairs.right, plain=plain))
    queries = pairs.left[pairs.left["id"].isin(matches["left_id"])]
    evaluator = InformationRetrievalEvaluator(
        dict(zip(queries["id"], product_text(queries, plain=plain), strict=True)),
        dict(zip(pairs.right["id"], product_text(pairs.right, plain=plain), strict=True)),
        matches.groupby("left_id")["right_id"].agg(set).to_dict(),
        accuracy_at_k=[1, 10], mrr_at_k=[100], ndcg_at_k=[10], precision_recall_at_k=[1], map_at_k=[1],
        batch_size=64, write_csv=False, score_functions={"cosine": cos_sim},
    )  # fmt: skip
    values = evaluator(encoder, corpus_embeddings=torch.from_numpy(right).to(encoder.device))
    names = {
        "recall_at_1": "accuracy@1", "recall_at_10": "accuracy@10", "mrr": "mrr@100", "ndcg_at_10": "ndcg@10"
    }  # fmt: skip
    scores = {name: float(values[f"cosine_{key}"]) for name, key in names.items()}
    return scores | {"queries": len(queries), "corpus": len(pairs.right)}


def pair_decision(embedded: EmbeddedPairs, split: str) -> dict[str, float]:
    """F1, precision and recall on the split at the threshold with the best F1 on the validation pairs."""
    from sentence_transformers.sentence_transformer.evaluation import BinaryClassificationEvaluator

    cosine, match = embedded.scores("valid")
    threshold = BinaryClassificationEvaluator.find_best_f1_and_threshold(cosine, match, True)[3]
    cosine, match = embedded.scores(split)
    decided = cosine >= threshold
    hits = (match & decided).sum()
    return {
        "threshold": float(threshold),
        "f1": float(2 * hits / max(1, match.sum() + decided.sum())),
        "precision": float(hits / max(1, decided.sum())),
        "recall": float(hits / max(1, match.sum())),
    }


def confidence(embedded: EmbeddedPairs, split: str, calibration: Calibration) -> dict[str, float]:
    """How well the calibrated probability holds on the split.

    calibration_error is the expected calibration error over ten equal bins (Naeini et al. 2015);
    high_precision and high_recall are those of calling every pair of high confidence a match.
    """
    cosine, match = embedded.scores(split)
    probability = calibration.probability(cosine)
    bins = np.minimum((probability * 10).astype(int), 9)
    gaps = [abs((probability - match)[bins == number].sum()) for number in range(10)]
    high = probability > HIGH
    return {
        "calibration_error": float(sum(gaps) / len(match)),
        "high_precision": float((match & high).sum() / max(1, high.sum())),
        "high_recall": float((match & high).sum() / max(1, match.sum())),
    }


def evaluate(
    encoder: SentenceTransformer, pairs: Pairs, split: str = "test", *, plain: bool = False
) -> tuple[dict[str, float], Calibration]:
    """All scores of one split, and the calibration fitted to the validation pairs."""
    embedded = EmbeddedPairs.of(encoder, pairs, plain=plain, progress=True)
    calibration = Calibration.fit(*embedded.scores("valid"))
    scores = retrieval(encoder, pairs, split, plain=plain, right=embedded.right) | pair_decision(
        embedded, split
    )
    return scores | confidence(embedded, split, calibration), calibration


def add_row(path: Path, row: dict[str, object]) -> None:
    """Add `row` to a csv, in place of an older row with the same dataset, model and split."""
    table = pd.DataFrame([row]).astype(str)
    if path.is_file():
        key = ["dataset", "model", "split"]
        older = read_table(path)
        same = (older[key] == [row[name] for name in key]).all(axis=1)
        table = pd.concat([older[~same], table], ignore_index=True).fillna("")
    with atomic_write(path) as file:
        table.to_csv(file, index=False)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(EvaluateSettings, argv, description="Score an encoder on labelled pairs.")
    pairs = read_pairs(settings.pairs)
    encoder = load_encoder(settings.model, max_length=settings.max_length, device=settings.device)
    scores, calibration = evaluate(encoder, pairs, settings.split, plain=settings.plain_text)
    dataset, model = Path(settings.pairs).resolve().name, settings.name or settings.model
    print(f"{dataset}, {settings.split}: {model}")
    for name, value in scores.items():
        print(f"  {name:26s} {value:.4f}" if isinstance(value, float) else f"  {name:26s} {value}")
    if settings.out:
        rounded = {
            name: round(value, 5) if isinstance(value, float) else value for name, value in scores.items()
        }
        add_row(Path(settings.out), {"dataset": dataset, "model": model, "split": settings.split, **rounded})
    if settings.calibration:
        write_json(settings.calibration, asdict(calibration))


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
