"""The decision: are two records one product? Yes or no, how probable it is, and what it was decided by.

Three kinds of evidence are combined by a logistic regression that is fitted to the validation pairs:

* trees: LightGBM on the pair features of `product_matching.features`
* cosine: of the two embeddings under the first stage's encoder
* cross: the logit of the cross-encoder, which reads both records together

The cross-encoder costs a thousand times what the others cost. So it reads only the pairs that trees and cosine leave
open, and these have a regression of their own. N records, n pairs, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from contracts.errors import InputError
from contracts.files import read_json, read_versioned, write_json
from product_matching.calibration import confidence_band
from product_matching.catalogue import COLUMNS, product_text, record_texts
from product_matching.encoder import encode, fingerprint, load_encoder
from product_matching.features import NAMES, Profile, Vocabulary, pair_features, profiles
from training.sealed import remove_sealed, require_whole, seal

if TYPE_CHECKING:
    import lightgbm
    from sentence_transformers import CrossEncoder, SentenceTransformer

SCHEMA = 1
OPEN = (0.01, 0.99)
"""A pair whose probability by trees and cosine lies between these is open: the cross-encoder reads it."""
FEWEST_PER_LABEL = 10
"""Matches, and non-matches, that the validation pairs must have. With fewer, the threshold would be chance."""


@dataclass
class Records:
    """A catalogue as the decision reads it. Everything that depends on one record alone is computed once."""

    table: pd.DataFrame
    profiles: list[Profile]
    vectors: np.ndarray
    """(N, D) float32, rows of length 1"""
    texts: list[str]
    """what the cross-encoder reads"""

    @classmethod
    def of(
        cls, table: pd.DataFrame, encoder: SentenceTransformer, vectors: np.ndarray | None = None
    ) -> Records:
        """Prepare the records of a catalogue. Columns of `COLUMNS` that the table lacks are taken as empty.

        Args:
            vectors: their embeddings under `encoder`, if they exist already.
        """
        table = table.reindex(columns=list(COLUMNS), fill_value="").reset_index(drop=True)
        if vectors is None:
            vectors = encode(encoder, product_text(table))
        return cls(table, profiles(table), vectors, record_texts(table))

    def __len__(self) -> int:
        return len(self.table)


@dataclass
class Evidence:
    """What speaks for a match in each of n pairs."""

    trees: np.ndarray
    """(n,) logit"""
    cosine: np.ndarray
    """(n,)"""
    cross: np.ndarray
    """(n,) logit; NaN where the cross-encoder has not read the pair"""


@dataclass
class Combination:
    """Match probability from several kinds of evidence: 1 / (1 + exp(−(weights · evidence + intercept)))."""

    weights: list[float]
    intercept: float

    @classmethod
    def fit(cls, evidence: np.ndarray, match: np.ndarray) -> Combination:
        """Fit to the evidence (n, kinds) and label (n,) bool of n pairs."""
        from sklearn.linear_model import LogisticRegression

        # the penalty on the weights treats all kinds alike only if their scales are alike
        center = evidence.mean(axis=0)
        scale = evidence.std(axis=0) + 1e-9
        fitted = LogisticRegression(max_iter=1000).fit((evidence - center) / scale, match)
        weights = fitted.coef_[0] / scale
        intercept = fitted.intercept_[0] - (weights * center).sum()
        return cls(weights.tolist(), float(intercept))

    def probability(self, evidence: np.ndarray) -> np.ndarray:
        logit = evidence @ np.array(self.weights) + self.intercept
        return 1 / (1 + np.exp(-np.clip(logit, -50, 50)))


@dataclass
class Verdicts:
    """The decision on n pairs."""

    probability: np.ndarray
    """(n,) that the pair is one product"""
    match: np.ndarray
    """(n,) bool"""
    evidence: Evidence

    def confidence(self) -> list[str]:
        """high, medium or low: the band of the probability of what was decided, match or not."""
        decided = np.where(self.match, self.probability, 1 - self.probability)
        return [confidence_band(probability) for probability in decided.tolist()]


@dataclass
class DecisionModel:
    """A trained decision. `load` reads one, `product_matching.train_decision` makes one."""

    encoder: SentenceTransformer
    vocabulary: Vocabulary
    trees: lightgbm.Booster
    cross_encoder: CrossEncoder | None
    quick: Combination
    """of trees and cosine"""
    thorough: Combination | None
    """of trees, cosine and cross, for open pairs; None without a cross-encoder"""
    threshold: float
    """a pair at least this probable is called a match; it has the best F1 on the validation pairs"""
    meta: dict[str, Any] = field(default_factory=dict)
    """encoder, its fingerprint and max_length; run"""

    def records(self, table: pd.DataFrame, vectors: np.ndarray | None = None) -> Records:
        return Records.of(table, self.encoder, vectors)

    def evidence(
        self,
        left: Records,
        right: Records,
        rows: np.ndarray,
        *,
        read: np.ndarray | None = None,
        progress: bool = False,
    ) -> Evidence:
        """Collect the evidence on n pairs.

        Args:
            rows: (n, 2) int, places of the pair's records in `left` and `right`.
            read: (n,) bool, the pairs that the cross-encoder reads; None: the open ones.
        """
        trees, cosine = cheap_evidence(left, right, rows, self.vocabulary, self.trees)
        cross = np.full(len(rows), np.nan)
        if self.cross_encoder is not None:
            from product_matching.cross_encoder import match_logits

            if read is None:
                probability = self.quick.probability(np.stack([trees, cosine], axis=1))
                read = is_open(probability)
            cross[read] = match_logits(
                self.cross_encoder,
                [left.texts[row] for row in rows[read, 0]],
                [right.texts[row] for row in rows[read, 1]],
                progress=progress,
            )
        return Evidence(trees, cosine, cross)

    def probability(self, evidence: Evidence) -> np.ndarray:
        """Match probability of each pair, (n,)."""
        probability = self.quick.probability(np.stack([evidence.trees, evidence.cosine], axis=1))
        was_read = ~np.isnan(evidence.cross)
        if self.thorough is not None and was_read.any():
            kinds = np.stack([evidence.trees, evidence.cosine, evidence.cross], axis=1)
            probability[was_read] = self.thorough.probability(kinds[was_read])
        return probability

    def decide(
        self,
        left: Records,
        right: Records,
        rows: np.ndarray,
        *,
        read: np.ndarray | None = None,
        progress: bool = False,
    ) -> Verdicts:
        """Decide on n pairs; the arguments are those of `evidence`. Swapped sides give the same decision."""
        evidence = self.evidence(left, right, rows, read=read, progress=progress)
        probability = self.probability(evidence)
        return Verdicts(probability, probability >= self.threshold, evidence)

    def save(self, folder: Path) -> None:
        remove_sealed(folder)
        folder.mkdir(parents=True)
        content = {
            "schema": SCHEMA,
            "features": list(NAMES),
            "quick": asdict(self.quick),
            "thorough": asdict(self.thorough) if self.thorough else None,
            "threshold": self.threshold,
            **self.meta,
        }
        write_json(folder / "decision.json", content)
        write_json(
            folder / "vocabulary.json", {"records": self.vocabulary.records, "counts": self.vocabulary.counts}
        )
        self.trees.save_model(str(folder / "trees.txt"))
        if self.cross_encoder is not None:
            self.cross_encoder.save_pretrained(str(folder / "cross_encoder"), create_model_card=False)
        seal(folder)

    @classmethod
    def load(
        cls, folder: Path | str, *, device: str = "auto", encoder: SentenceTransformer | None = None
    ) -> DecisionModel:
        """Read a decision. Raises InputError for a damaged folder, or an encoder that it was not trained with.

        Args:
            encoder: the first stage, if it is loaded already; None loads the one that the decision names.
        """
        import lightgbm

        folder = Path(folder)
        if not (folder / "decision.json").is_file():
            raise InputError(
                f"{folder}: no decision.json there; run python -m product_matching.train_decision"
            )
        require_whole(folder)  # before LightGBM reads its file: one that is cut short can crash the process
        content = read_versioned(folder / "decision.json", SCHEMA, "train the decision again")
        if content.pop("features") != list(NAMES):
            raise InputError(f"{folder}: trained on other pair features; train the decision again")
        words = read_json(folder / "vocabulary.json")
        cross_encoder = None
        thorough = None
        quick = Combination(**content.pop("quick"))
        coefficients = content.pop("thorough")
        if coefficients is not None:
            from product_matching.cross_encoder import load_cross_encoder

            thorough = Combination(**coefficients)
            cross_encoder = load_cross_encoder(
                str(folder / "cross_encoder"), pair_tokens=content["pair_tokens"], device=device
            )
        if encoder is None:
            encoder = load_encoder(content["encoder"], max_length=content["max_length"], device=device)
        model = cls(
            encoder,
            Vocabulary(words["counts"], words["records"]),
            lightgbm.Booster(model_file=str(folder / "trees.txt")),
            cross_encoder,
            quick,
            thorough,
            content.pop("threshold"),
            content,
        )
        found = fingerprint(encoder)
        if found != content["fingerprint"]:
            raise InputError(
                f"decision {folder} (run {content['run']}) was trained with encoder {content['encoder']} "
                f"(weights {content['fingerprint']}), and this encoder has weights {found}; "
                "build the index with that encoder, or train the decision with this one"
            )
        return model


def cheap_evidence(
    left: Records, right: Records, rows: np.ndarray, vocabulary: Vocabulary, trees: lightgbm.Booster
) -> tuple[np.ndarray, np.ndarray]:
    """Logit of the trees and cosine of n pairs, (n,) float64 each."""
    if len(rows) == 0:
        return np.zeros(0), np.zeros(0)
    features = pair_features(left.profiles, right.profiles, rows, vocabulary)
    logit = np.asarray(trees.predict(features, raw_score=True), np.float64)
    cosine = (left.vectors[rows[:, 0]] * right.vectors[rows[:, 1]]).sum(axis=1).astype(np.float64)
    return logit, cosine


def is_open(probability: np.ndarray) -> np.ndarray:
    low, high = OPEN
    return (probability > low) & (probability < high)


def probability_histogram(probability: np.ndarray) -> np.ndarray:
    """Counts of the probability in ten equal bins, for the drift that product_matching.monitor reports."""
    return np.histogram(probability, bins=10, range=(0, 1))[0]


def best_threshold(probability: np.ndarray, match: np.ndarray) -> float:
    """The probability with the best F1 of "at least this probable", midway between two pairs."""
    order = np.argsort(-probability, kind="stable")
    found = np.arange(1, len(order) + 1)
    true_positives = np.cumsum(match[order])
    f1 = 2 * true_positives / (found + match.sum())
    # pairs of one probability cannot be told apart, so a threshold lies only between different ones
    falling = probability[order]
    f1[:-1][falling[:-1] == falling[1:]] = 0
    best = int(f1.argmax())
    below = falling[best + 1] if best + 1 < len(falling) else 0.0
    return float((falling[best] + below) / 2)


def f1_scores(found: np.ndarray, match: np.ndarray) -> dict[str, float]:
    """F1, precision and recall of the decision `found` (n,) bool on labels `match` (n,) bool."""
    true_positives = (found & match).sum()
    return {
        # max(1, …): without matches, or without pairs that are called one, the scores are 0
        "f1": float(2 * true_positives / max(1, found.sum() + match.sum())),
        "precision": float(true_positives / max(1, found.sum())),
        "recall": float(true_positives / max(1, match.sum())),
    }


def rows_of(
    left: Sequence[str] | pd.Series, right: Sequence[str] | pd.Series, labelled: pd.DataFrame
) -> np.ndarray:
    """(n, 2) int: places of the records of labelled pairs, given the ids of both catalogues."""
    left_rows = pd.Index(left).get_indexer(labelled["left_id"])
    right_rows = pd.Index(right).get_indexer(labelled["right_id"])
    return np.stack([left_rows, right_rows], axis=1)
