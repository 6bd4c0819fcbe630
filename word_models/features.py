"""What the models see of a product: TF-IDF of its texts, the meanings of its words, and its parsed amounts.

Legend: N catalogue rows, V terms, S structural columns, D dimensions of a view of meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sparse

from word_models.amounts import NOT_COMPARED, amount_bins, amounts, columns_of
from word_models.meanings import meanings

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

WORD = r"(?u)[^\W\d_]+|\d+(?:\.\d+)?"
"""A word or a number. Numbers stay whole: 1.5 is not 1 and 5."""
TERM_GROUPS = ("title words", "text words", "word pairs", "title pieces", "words by amount")
COMPARED_TERMS = ("title words and pairs", "text words", "title pieces")
"""Blocks of terms that a similarity compares. Pairs of text words would add nothing but time."""
WORD_BY_AMOUNT = 0.6
"""Strength of a title word times the standardised amount, against the word itself."""
VIEW_STRENGTH = np.float32(np.sqrt(2))
"""A view's rows have length 1. Scaled by √2, a view weighs as much as two standardised columns."""
MIN_DEVIATION = 1e-6
"""Added to a column's standard deviation, so that a constant column can be divided by it."""


@dataclass
class Features:
    """N rows in the order of the table that they were made from."""

    terms: sparse.csr_matrix
    """(N, V) float32; each row of each block of terms has length 1"""
    structural: np.ndarray
    """(N, S) float32: amounts standardised on the training rows, their bins, and what was added to them"""
    columns: dict[str, slice]
    """the columns of `structural` by name, in order: those of `word_models.amounts`, then the added ones"""
    meanings: tuple[np.ndarray, ...] = ()
    """(N, D) float32 each, rows of length 1, or 0 where nothing is known: `word_models.meanings`, then embeddings"""
    compared_terms: tuple[slice, ...] = ()
    """the columns of `terms` that a similarity compares, one slice per block of COMPARED_TERMS"""

    def __getitem__(self, rows: np.ndarray) -> Features:
        """The same features of some rows, given as positions or as a mask."""
        return replace(
            self,
            terms=self.terms[rows],
            structural=self.structural[rows],
            meanings=tuple(view[rows] for view in self.meanings),
        )

    def __len__(self) -> int:
        return len(self.structural)

    def columns_named(self, name: str) -> np.ndarray:
        """The structural columns of this name, (N, columns)."""
        return self.structural[:, self.columns[name]]

    def with_columns(self, named: dict[str, np.ndarray]) -> Features:
        """The same rows with more structural columns: new names with (N, columns) each."""
        added = columns_of(named, first=self.structural.shape[1])
        assert not added.keys() & self.columns.keys(), f"columns named twice: {list(added)}"
        structural = np.hstack([self.structural, *named.values()]).astype(np.float32)
        return replace(self, structural=structural, columns=self.columns | added)

    @property
    def dense(self) -> np.ndarray:
        """Structural columns and views of meaning side by side, (N, S + ΣD)."""
        return np.hstack([self.structural, *(VIEW_STRENGTH * view for view in self.meanings)])

    @property
    def amount(self) -> np.ndarray:
        """Standardised logarithm of the total amount, (N,)."""
        return self.columns_named("total_amount")[:, 0]

    @property
    def compared_columns(self) -> dict[str, slice]:
        """The structural columns that a similarity compares; those of one name are compared together."""
        return {name: where for name, where in self.columns.items() if name not in NOT_COMPARED}


@dataclass
class TermNames:
    """What the columns of `Features.terms` stand for."""

    text: np.ndarray
    """(V,) str: a word, two words, or a piece of a word in which a space marks the word's start or end"""
    group: np.ndarray
    """(V,) str, one of TERM_GROUPS"""


def build_features(train: pd.DataFrame, test: pd.DataFrame) -> dict[str, Features]:
    """Features of both prepared tables, under "train" and "test".

    Vocabulary and scaling come from the training rows, meanings from the texts of both tables; no price is used.
    """
    return with_meanings(FeatureBuilder(train), train, test)


def with_meanings(builder: FeatureBuilder, train: pd.DataFrame, test: pd.DataFrame) -> dict[str, Features]:
    """What `builder` makes of both tables, with the views of meaning."""
    tables = {"train": train, "test": test}
    views = meanings(tables, WORD)
    return {split: replace(builder(table), meanings=views[split]) for split, table in tables.items()}


class FeatureBuilder:
    """Turns prepared tables into features with the vocabulary and the scaling of the training table."""

    def __init__(self, train: pd.DataFrame):
        self.blocks = term_blocks()
        for column, vectorizer in self.blocks.values():
            vectorizer.fit(train[column])
        # what one more ounce costs depends on the product: a word's slope stands beside the word
        self.by_amount = word_vectorizer(min_df=3).fit(train["entity_name"])
        self.pieces_of = self.blocks["title pieces"][1].build_analyzer()
        """The title pieces that a word is cut into, called with the word as it stands between spaces."""
        # mean and deviation of the training rows, for both tables
        numbers = np.hstack(list(amounts(train).values()))
        self.mean = numbers.mean(axis=0)
        self.deviation = numbers.std(axis=0) + MIN_DEVIATION

    def __call__(self, table: pd.DataFrame) -> Features:
        """Features of a prepared table, without views of meaning."""
        numbers = amounts(table)
        columns = columns_of(numbers)
        standardised = (np.hstack(list(numbers.values())) - self.mean) / self.deviation

        blocks = {
            name: vectorizer.transform(table[column]) for name, (column, vectorizer) in self.blocks.items()
        }
        where = columns_of(blocks)
        amount = standardised[:, columns["total_amount"]][:, 0]
        slopes = sparse.diags(WORD_BY_AMOUNT * amount) @ self.by_amount.transform(table["entity_name"])
        terms = sparse.hstack([*blocks.values(), slopes], format="csr")  # (N, V)

        features = Features(
            terms.astype(np.float32),
            standardised.astype(np.float32),
            columns,
            compared_terms=tuple(where[name] for name in COMPARED_TERMS),
        )
        # bins are 0 or 1 and are not standardised: a rare bin would become a huge number
        return features.with_columns(amount_bins(table))

    def term_names(self) -> TermNames:
        """Names of the terms, in the order of their columns."""
        texts = []
        groups = []
        for block, (_, vectorizer) in self.blocks.items():
            names = vectorizer.get_feature_names_out()
            texts.append(names)
            groups.append(_groups_of(block, names))
        slopes = [f"{word} × amount" for word in self.by_amount.get_feature_names_out()]
        texts.append(np.array(slopes))
        groups.append(np.full(len(slopes), "words by amount"))
        return TermNames(np.concatenate(texts), np.concatenate(groups))


def term_blocks() -> dict[str, tuple[str, TfidfVectorizer]]:
    """The blocks of terms in their order: the text column that each is counted in, and an unfitted vectorizer."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # pieces of words reach brands and spellings that occur once
    pieces = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(3, 4), min_df=5, sublinear_tf=True, dtype=np.float32
    )
    return {
        "title words and pairs": ("entity_name", word_vectorizer(ngram_range=(1, 2), min_df=2)),
        "text words": ("catalog_content", word_vectorizer(min_df=3)),
        "text pairs": ("catalog_content", word_vectorizer(ngram_range=(2, 2), min_df=8)),
        "title pieces": ("entity_name", pieces),
    }


def word_vectorizer(**options) -> TfidfVectorizer:
    """TF-IDF of words, by default of single ones; `options` are scikit-learn's."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(token_pattern=WORD, sublinear_tf=True, dtype=np.float32, **options)


def _groups_of(block: str, names: np.ndarray) -> np.ndarray:
    """The group of each term of a block, (terms,) str."""
    if block == "title pieces":  # a space in a piece is the edge of a word
        return np.full(len(names), "title pieces")
    words = "title words" if block == "title words and pairs" else "text words"
    return np.where([" " in name for name in names], "word pairs", words)
