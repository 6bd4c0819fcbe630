"""What the models see of a product: TF-IDF of its texts, what its words mean, and the parsed amounts.

Legend: N catalogue rows, V terms, S structural features, D dimensions of a view of meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy.sparse as sparse

from contracts.embeddings import Embeddings, align, read_embeddings
from contracts.errors import InputError
from contracts.splits import N_FOLDS, leaked_folds, split_hash
from contracts.workspace import SPLITS, Workspace
from word_models.meanings import meanings

WORD = r"(?u)[^\W\d_]+|\d+(?:\.\d+)?"  # numbers stay whole: 1.5 is not 1 and 5
UNIT_KINDS = ("weight", "volume", "count", "none")
AMOUNT_BINS = np.linspace(0, 10, 21)  # of log1p(total amount)
PACK_BINS = np.log([1.5, 2.5, 3.5, 4.5, 6.5, 9, 12.5, 18, 30, 60])
TERM_GROUPS = ("title words", "text words", "word pairs", "title pieces", "words by amount")
N_AMOUNTS = 6  # the first columns of `amounts`
KIND_COLUMNS = [14, 15, 16, 17]  # of `amounts`
BY_AMOUNT = 0.6  # strength of a title word times the standardised amount, beside the word itself


@dataclass
class Features:
    """Rows in the order of the table they were made from."""

    terms: sparse.csr_matrix
    """(N, V) float32, each block of terms scaled to length 1 a row"""
    structural: np.ndarray
    """(N, S) float32, standardised on the training rows; the columns of `structural_fields`, then those that an
    embedding file names"""
    meanings: tuple[np.ndarray, ...] = ()
    """(N, D) float32 each, rows of length 1 (0 where nothing is known): `word_models.meanings`, then --embeddings"""
    compared_blocks: tuple[slice, ...] = ()
    """columns of `terms` that a similarity compares: name words and pairs, text words, name pieces"""

    def __getitem__(self, rows: np.ndarray) -> Features:
        meanings = tuple(view[rows] for view in self.meanings)
        return Features(self.terms[rows], self.structural[rows], meanings, self.compared_blocks)

    @property
    def dense(self) -> np.ndarray:
        """All that is not a term, (N, S + ΣD); each view as strong as two standardised columns."""
        return np.hstack([self.structural, *(np.float32(np.sqrt(2)) * view for view in self.meanings)])

    @property
    def compared_amounts(self) -> list[list[int]]:
        """Columns of `structural` that a similarity compares, together if in one list."""
        named = range(len(structural_fields()), self.structural.shape[1])
        return [*([column] for column in range(N_AMOUNTS)), KIND_COLUMNS, *([column] for column in named)]


@dataclass
class TermNames:
    """What the columns of `Features.terms` stand for."""

    text: np.ndarray
    """(V,) str: a word, two words, or a piece of a word in which a space marks its start or end"""
    group: np.ndarray
    """(V,) str, one of TERM_GROUPS"""


def build_features(train: pd.DataFrame, test: pd.DataFrame) -> tuple[Features, Features]:
    """Features of both prepared tables. Terms and scaling come from the training texts, meanings from both tables'
    texts; no price is used."""
    return with_meanings(FeatureBuilder(train), train, test)


def with_meanings(
    builder: FeatureBuilder, train: pd.DataFrame, test: pd.DataFrame
) -> tuple[Features, Features]:
    views = meanings({"train": train, "test": test}, WORD)
    return replace(builder(train), meanings=views["train"]), replace(builder(test), meanings=views["test"])


class FeatureBuilder:
    """Turns prepared tables into features by the vocabulary and the scaling of the training table."""

    def __init__(self, train: pd.DataFrame):
        from sklearn.feature_extraction.text import TfidfVectorizer

        scale = {"sublinear_tf": True, "dtype": np.float32}
        words = {"token_pattern": WORD, **scale}
        blocks = [
            ("entity_name", TfidfVectorizer(ngram_range=(1, 2), min_df=2, **words)),
            ("catalog_content", TfidfVectorizer(min_df=3, **words)),
            ("catalog_content", TfidfVectorizer(ngram_range=(2, 2), min_df=8, **words)),
            # pieces of words reach brands and spellings that occur once
            ("entity_name", TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), min_df=5, **scale)),
        ]  # fmt: skip
        self.fitted = [(column, vectorizer.fit(train[column])) for column, vectorizer in blocks]
        self.pieces_of = blocks[-1][1].build_analyzer()
        """the title pieces that one word is cut into, as it stands between spaces"""
        # what one more ounce costs depends on the product: a word's slope, beside the word
        self.by_amount = TfidfVectorizer(min_df=3, **words).fit(train["entity_name"])
        numbers = amounts(train)
        self.mean, self.deviation = numbers.mean(axis=0), numbers.std(axis=0) + 1e-6

    def __call__(self, table: pd.DataFrame) -> Features:
        numbers = (amounts(table) - self.mean) / self.deviation
        blocks = [vectorizer.transform(table[column]) for column, vectorizer in self.fitted]
        slopes = sparse.diags(BY_AMOUNT * numbers[:, 0]) @ self.by_amount.transform(table["entity_name"])
        terms = sparse.hstack([*blocks, slopes], format="csr")
        structural = np.hstack([numbers, amount_bins(table)])
        ends = np.cumsum([0, *(block.shape[1] for block in blocks)])
        name, text, _, pieces = (slice(*ends[block : block + 2]) for block in range(4))
        return Features(
            terms.astype(np.float32), structural.astype(np.float32), compared_blocks=(name, text, pieces)
        )

    def term_names(self) -> TermNames:
        texts = [vectorizer.get_feature_names_out() for _, vectorizer in self.fitted]
        title, text, text_pairs, pieces = texts
        groups = [
            np.where([" " in term for term in title], "word pairs", "title words"),
            np.full(len(text), "text words"),
            np.full(len(text_pairs), "word pairs"),
            np.full(len(pieces), "title pieces"),
        ]
        slopes = np.array([f"{word} × amount" for word in self.by_amount.get_feature_names_out()])
        groups.append(np.full(len(slopes), "words by amount"))
        return TermNames(np.concatenate([*texts, slopes]), np.concatenate(groups))


def add_embeddings(
    features: dict[str, Features], workspace: Workspace, names: tuple[str, ...]
) -> dict[str, Features]:
    """The features of both splits with the columns of embedding files.

    Columns with a name (log price, amounts) become structural ones, standardised on the training rows; the nameless
    ones are one more view of meaning. Rows without an embedding have the mean of the first and nothing of the second.

    Raises:
        InputError: a file of other folds, or one whose encoder was fitted on rows that it embeds: a model would learn
            to trust what the encoder remembers.
    """
    for name in names:
        columns, valid, named = {}, {}, 0
        for split in SPLITS:
            content = _read(workspace, name, split)
            aligned = align(content, workspace.prepared(split)["sample_id"].to_numpy(), name)
            columns[split], valid[split] = aligned.embeddings, aligned.valid
            named = len(content.meta.get("last_columns", ()))
        known = columns["train"][valid["train"]]
        mean, deviation = known.mean(axis=0), known.std(axis=0) + 1e-6
        first_named = known.shape[1] - named
        for split, old in features.items():
            centred = np.where(valid[split][:, None], columns[split] - mean, 0).astype(np.float32)
            view = centred[:, :first_named]
            view /= np.maximum(np.linalg.norm(view, axis=1, keepdims=True), 1e-9)
            structural = np.hstack([old.structural, centred[:, first_named:] / deviation[first_named:]])
            features = features | {split: replace(old, structural=structural, meanings=(*old.meanings, view))}
    return features


def _read(workspace: Workspace, name: str, split: str) -> Embeddings:
    path = workspace.path("embeddings", name=name, split=split)
    content = read_embeddings(path)
    if content.meta["split_hash"] != split_hash(workspace.folds()):
        raise InputError(f"{path}: made with another fold file than data/folds.csv; extract it again")
    if split == "train" and (folds := leaked_folds(content.meta["fitted_on"], tuple(range(N_FOLDS)))):
        raise InputError(
            f"{path}: its encoder was fitted on rows that it embeds (folds {folds}); use an out-of-fold run "
            "(qwen3_finetune.train --folds 5) or a frozen encoder"
        )
    return content


def amounts(table: pd.DataFrame) -> np.ndarray:
    """Logarithms of amounts and text lengths, amounts also apart for each kind of unit, (N, 18)."""
    total, item = (np.log1p(table[name].fillna(0).to_numpy()) for name in ("total_amount", "item_size"))
    pack = np.log(table["pack_count"].to_numpy())
    lengths = [np.log1p(table[name].str.len().to_numpy()) for name in ("catalog_content", "entity_name")]
    kinds = np.stack([(table["unit_kind"] == kind).to_numpy(float) for kind in UNIT_KINDS], axis=1)
    common = np.stack([total, pack, item, table["quantity_value"].to_numpy(), *lengths], axis=1)
    return np.hstack([common, kinds * total[:, None], kinds * pack[:, None], kinds])


def amount_bins(table: pd.DataFrame) -> np.ndarray:
    """One-hot bins of total amount and pack, so that a price need not be linear in either, (N, 33)."""
    total = np.digitize(np.log1p(table["total_amount"].fillna(0).to_numpy()), AMOUNT_BINS)
    pack = np.digitize(np.log(table["pack_count"].to_numpy()), PACK_BINS)
    return np.hstack([np.eye(len(AMOUNT_BINS) + 1)[total], np.eye(len(PACK_BINS) + 1)[pack]])


def structural_fields() -> np.ndarray:
    """The parsed field behind each column of `Features.structural`, (S,) str."""
    common = ["total amount", "pack count", "item size", "total amount", "text length", "title length"]
    by_kind = [field for field in ("total amount", "pack count", "unit kind") for _ in UNIT_KINDS]
    bins = ["total amount"] * (len(AMOUNT_BINS) + 1) + ["pack count"] * (len(PACK_BINS) + 1)
    return np.array(common + by_kind + bins)
