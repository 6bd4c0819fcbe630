"""Train the decision whether two records are one product.

    python -m product_matching.train_decision --pairs ../shared/data/matching/walmart_amazon
    python -m product_matching.train_decision --pairs catalogues --encoder checkpoints/product_matching/model
    python -m product_matching.train_decision --pairs catalogues --no-cross-encoder      # a minute on one core

Trees and cross-encoder learn from the training pairs, with hard negatives that the first stage mines among the
training records. What combines them, and the threshold, come from the validation pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from contracts.workspace import Workspace
from product_matching.catalogue import product_text
from product_matching.config import DecisionSettings
from product_matching.features import NAMES, Vocabulary, pair_features
from product_matching.pairs import Pairs, pair_files, read_pairs
from product_matching.triplets import mine_triplets, training_pairs
from training.device import seed_everything
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    import lightgbm
    from sentence_transformers import CrossEncoder

    from product_matching.decision import DecisionModel, Records


def require_both_labels(pairs: Pairs, source: str) -> None:
    """Raises InputError for validation pairs that are too few to fit a probability and a threshold to."""
    from product_matching.decision import FEWEST_PER_LABEL

    matches = len(pairs.matches("valid"))
    others = len(pairs.of("valid")) - matches
    if min(matches, others) < FEWEST_PER_LABEL:
        raise InputError(
            f"{source}: the validation pairs have {matches} matches and {others} non-matches; the threshold needs "
            f"at least {FEWEST_PER_LABEL} of each"
        )


def with_mined_negatives(
    pairs: Pairs, left: Records, right: Records, settings: DecisionSettings
) -> pd.DataFrame:
    """The training pairs, and the most similar other products of each match as further non-matches."""
    train = training_pairs(pairs, settings.held_out)
    # the records are embedded already
    texts = [*product_text(pairs.left), *product_text(pairs.right)]
    vectors = [*left.vectors, *right.vectors]
    vector_of = dict(zip(texts, vectors, strict=True))
    triplets = mine_triplets(
        pairs,
        train,
        lambda wanted: np.stack([vector_of[text] for text in wanted]),
        negatives=settings.negatives,
    )
    mined = triplets[["anchor_id", "negative_id"]].drop_duplicates().to_numpy()
    non_matches = pd.DataFrame(mined, columns=["left_id", "right_id"]).assign(match=False, split="train")
    # a pair that has a label keeps it
    return pd.concat([train, non_matches]).drop_duplicates(["left_id", "right_id"], ignore_index=True)


def fit_trees(features: np.ndarray, match: np.ndarray, settings: DecisionSettings) -> lightgbm.Booster:
    """Gradient-boosted trees on the pair features (n, len(NAMES)) and labels (n,) bool."""
    import lightgbm

    if match.all() or not match.any():
        raise InputError(f"{settings.pairs}: the training pairs need matches and non-matches")
    parameters = {
        "objective": "binary",
        "learning_rate": settings.tree_lr,
        "num_leaves": settings.leaves,
        "min_data_in_leaf": 10,
        "feature_fraction": 0.5,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "lambda_l2": 1.0,
        "seed": settings.seed,
        "deterministic": True,
        "force_row_wise": True,
        "verbose": -1,
    }
    data = lightgbm.Dataset(features, match, feature_name=list(NAMES))
    return lightgbm.train(parameters, data, settings.rounds)


def fit_cross_encoder(
    left: Records,
    right: Records,
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    settings: DecisionSettings,
    run: RunFolder,
) -> CrossEncoder:
    """Train the cross-encoder on the matches and the non-matches with the highest cosine.

    Args:
        train, valid: rows (n, 2) int and labels (n,) bool of the pairs.
    """
    from product_matching.cross_encoder import PairTexts, fit, load_cross_encoder

    rows, match = train
    cosine = (left.vectors[rows[:, 0]] * right.vectors[rows[:, 1]]).sum(axis=1)
    hardest_first = np.argsort(np.where(match, -np.inf, -cosine), kind="stable")
    wanted = match.sum() * (1 + settings.cross_negatives)
    chosen = hardest_first[:wanted]  # matches come first

    def texts(rows: np.ndarray, match: np.ndarray) -> PairTexts:
        return PairTexts(
            [left.texts[row] for row in rows[:, 0]], [right.texts[row] for row in rows[:, 1]], match
        )

    model = load_cross_encoder(settings.model, pair_tokens=settings.pair_tokens, device=settings.device)
    best = fit(model, texts(rows[chosen], match[chosen]), texts(*valid), settings, run)
    print(f"cross-encoder: epoch {best.epoch} has the best validation average precision, {best.score:.4f}")
    return model


def train_model(pairs: Pairs, settings: DecisionSettings, run: RunFolder) -> DecisionModel:
    """All parts of the decision."""
    from product_matching.decision import (
        Combination,
        DecisionModel,
        Records,
        best_threshold,
        probability_histogram,
        rows_of,
    )
    from product_matching.encoder import fingerprint, load_encoder

    encoder = load_encoder(settings.encoder, max_length=settings.max_length, device=settings.device)
    left = Records.of(pairs.left, encoder)
    right = Records.of(pairs.right, encoder)
    train = with_mined_negatives(pairs, left, right, settings)
    train_rows = rows_of(pairs.left["id"], pairs.right["id"], train)
    train_match = train["match"].to_numpy(bool)
    valid = pairs.of("valid")
    valid_rows = rows_of(pairs.left["id"], pairs.right["id"], valid)
    valid_match = valid["match"].to_numpy(bool)
    print(f"{train_match.sum()} matches and {(~train_match).sum()} non-matches to learn from")

    # words are counted in all records, since a catalogue is known before its matches are
    vocabulary = Vocabulary.of([*left.profiles, *right.profiles])
    trees = fit_trees(
        pair_features(left.profiles, right.profiles, train_rows, vocabulary), train_match, settings
    )
    cross_encoder = None
    if settings.cross_encoder:
        cross_encoder = fit_cross_encoder(
            left, right, (train_rows, train_match), (valid_rows, valid_match), settings, run
        )
    nothing = Combination([0.0, 0.0], 0.0)
    meta = {
        "run": settings.run,
        "encoder": settings.encoder,
        "fingerprint": fingerprint(encoder),
        "max_length": settings.max_length,
        "pair_tokens": settings.pair_tokens,
    }
    model = DecisionModel(encoder, vocabulary, trees, cross_encoder, nothing, None, 0.5, meta)
    # the training pairs would not do: trees and cross-encoder know them by heart
    unread = np.zeros(len(valid_rows), bool)
    evidence = model.evidence(left, right, valid_rows, read=unread)
    quick = np.stack([evidence.trees, evidence.cosine], axis=1)
    model.quick = Combination.fit(quick, valid_match)
    if cross_encoder is not None:
        read = readable(model.quick.probability(quick), valid_match)
        evidence = model.evidence(left, right, valid_rows, read=read, progress=True)
        kinds = np.stack([evidence.trees, evidence.cosine, evidence.cross], axis=1)
        model.thorough = Combination.fit(kinds[read], valid_match[read])
    probability = model.probability(evidence)
    model.threshold = best_threshold(probability, valid_match)
    # what the probabilities of later decisions are compared with
    model.meta["valid_histogram"] = probability_histogram(probability).tolist()
    return model


def readable(probability: np.ndarray, match: np.ndarray) -> np.ndarray:
    """(n,) bool: the validation pairs that the cross-encoder reads, the open ones, or all if these are too few."""
    from product_matching.decision import FEWEST_PER_LABEL, is_open

    opened = is_open(probability)
    enough = min((opened & match).sum(), (opened & ~match).sum()) >= FEWEST_PER_LABEL
    return opened if enough else np.ones(len(match), bool)


def score_split(model: DecisionModel, pairs: Pairs, split: str) -> dict[str, float]:
    """F1, precision and recall of the decision on the labelled pairs of one split."""
    from product_matching.decision import f1_scores, rows_of

    part = pairs.only(split)
    rows = rows_of(part.left["id"], part.right["id"], part.labelled)
    verdicts = model.decide(model.records(part.left), model.records(part.right), rows)
    return f1_scores(verdicts.match, part.labelled["match"].to_numpy(bool))


def train(settings: DecisionSettings) -> Path:
    """Train, and return the folder of the decision."""
    folder = Workspace(settings.workspace).path("run", name=settings.run)
    decision_folder = folder / "decision"
    if RunFolder(folder).already_complete(settings.resume, settings, pair_files(settings.pairs)):
        return decision_folder
    pairs = read_pairs(settings.pairs)
    require_both_labels(pairs, settings.pairs)
    seed_everything(settings.seed)
    run = RunFolder.start(folder, settings, inputs=pair_files(settings.pairs), report_to=settings.report_to)
    model = train_model(pairs, settings, run)
    model.save(decision_folder)
    scores = score_split(model, pairs, "valid")
    run.finish(threshold=model.threshold, **{f"valid_{name}": value for name, value in scores.items()})
    print(f"validation F1 {scores['f1']:.3f} at threshold {model.threshold:.3f} → {decision_folder}")
    return decision_folder


def main(argv: Sequence[str] | None = None) -> Path:
    return train(
        parse_settings(
            DecisionSettings, argv, description="Train the decision whether two records are one product."
        )
    )


if __name__ == "__main__":
    run_entry_point(main)
