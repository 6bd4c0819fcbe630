"""What the models see of a product: TF-IDF of its texts, the meanings of its words, and its parsed amounts.

Legend: N catalogue rows, V terms, S structural columns, D dimensions of a view of meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sparse

from contracts.catalog import FeatureKind
from word_models.amounts import MIN_DEVIATION, NOT_COMPARED, amount_bins, amounts, columns_of
from word_models.facts import Facts
from word_models.meanings import Meanings
from word_models.terms import load_vocabularies, piece_vectorizer, save_vocabularies, word_vectorizer

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

SLOPES = "words by amount"
CATEGORIES = "categories"
TERM_GROUPS = ("title words", "text words", "word pairs", "title pieces", SLOPES, CATEGORIES)
TEXT_OF_BLOCK = {
    "title words and pairs": "entity_name",
    "text words": "catalog_content",
    "text pairs": "catalog_content",
    "title pieces": "entity_name",
}
"""The text column in which the terms of each block are counted."""
COMPARED_TERMS = ("title words and pairs", "text words", "title pieces")
"""Blocks of terms that a similarity compares. Pairs of text words would add nothing but time."""
WORD_BY_AMOUNT = 0.6
"""Strength of a title word times the standardised amount, against the word itself."""
VIEW_STRENGTH = np.float32(np.sqrt(2))
"""A view's rows have length 1. Scaled by √2, a view weighs as much as two standardised columns."""


@dataclass
class Features:
    """N rows in the order of the table that they were made from."""

    terms: sparse.csr_matrix
    """(N, V) float32; each row of each block of terms has length 1"""
    structural: np.ndarray
    """(N, S) float32: amounts standardised on the training rows, their bins, further facts, and what was added"""
    columns: dict[str, slice]
    """the columns of `structural` by name, in order: those of `word_models.amounts`, then the added ones"""
    meanings: tuple[np.ndarray, ...] = ()
    """(N, D) float32 each, rows of length 1, or 0 where nothing is known: `word_models.meanings`, then embeddings"""
    compared_terms: tuple[slice, ...] = ()
    """the columns of `terms` that a similarity compares, one slice per block of COMPARED_TERMS, then
    one per category fact"""

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
    """(V,) str: a word, two words, a piece of a word in which a space marks the word's start or end, or a category such
    as "brand=acme\""""
    group: np.ndarray
    """(V,) str, one of TERM_GROUPS"""


def build_features(
    train: pd.DataFrame, test: pd.DataFrame | None = None, facts: dict[str, FeatureKind] | None = None
) -> dict[str, Features]:
    """Features of the prepared tables, under "train" and, if it is given, "test". See `FeatureBuilder.fit`."""
    tables = {"train": train} if test is None else {"train": train, "test": test}
    builder = FeatureBuilder.fit(train, [] if test is None else [test], facts=facts)
    return {name: builder(table) for name, table in tables.items()}


class FeatureBuilder:
    """Turns prepared tables into features with the vocabulary and the scaling of the training table."""

    def __init__(
        self,
        blocks: dict[str, TfidfVectorizer],
        by_amount: TfidfVectorizer,
        mean: np.ndarray,
        deviation: np.ndarray,
        facts: Facts,
        meanings: Meanings,
    ):
        """
        Args:
            blocks: the fitted vectorizers of TEXT_OF_BLOCK.
            by_amount: fitted on titles; its words are multiplied by the amount.
            mean: of each column of `amounts` over the training rows.
            deviation: standard deviation of the same.
        """
        self.blocks = blocks
        self.by_amount = by_amount
        self.mean = mean
        self.deviation = deviation
        self.facts = facts
        self.meanings = meanings
        self.pieces_of = blocks["title pieces"].build_analyzer()
        """The title pieces that a word is cut into, called with the word as it stands between spaces."""

    @classmethod
    def fit(
        cls,
        train: pd.DataFrame,
        others: list[pd.DataFrame],
        *,
        facts: dict[str, FeatureKind] | None = None,
    ) -> FeatureBuilder:
        """Vocabulary and scaling come from the training rows, meanings from all texts; no price is used.

        Args:
            train: prepared training rows.
            others: further prepared tables, whose texts show what words mean.
            facts: names and kinds of the `feature_<name>` columns to use.
        """
        blocks = term_blocks()
        for name, vectorizer in blocks.items():
            vectorizer.fit(train[TEXT_OF_BLOCK[name]])
        numbers = np.hstack(list(amounts(train).values()))
        return cls(
            blocks,
            slope_vectorizer().fit(train["entity_name"]),
            numbers.mean(axis=0),
            numbers.std(axis=0) + MIN_DEVIATION,
            Facts.fit(train, facts or {}),
            Meanings.fit([train, *others]),
        )

    def __call__(self, table: pd.DataFrame) -> Features:
        """Features of a prepared table."""
        numbers = amounts(table)
        columns = columns_of(numbers)
        standardised = (np.hstack(list(numbers.values())) - self.mean) / self.deviation

        blocks = {
            name: vectorizer.transform(table[TEXT_OF_BLOCK[name]]) for name, vectorizer in self.blocks.items()
        }
        # what one more ounce costs depends on the product: a word's slope stands beside the word
        amount = standardised[:, columns["total_amount"]][:, 0]
        blocks[SLOPES] = sparse.diags(WORD_BY_AMOUNT * amount) @ self.by_amount.transform(
            table["entity_name"]
        )
        categories = self.facts.terms(table)
        blocks |= categories
        where = columns_of(blocks)
        terms = sparse.hstack(list(blocks.values()), format="csr")  # (N, V)

        features = Features(
            terms.astype(np.float32),
            standardised.astype(np.float32),
            columns,
            self.meanings.transform(table),
            compared_terms=tuple(where[name] for name in (*COMPARED_TERMS, *categories)),
        )
        # bins are 0 or 1 and are not standardised: a rare bin would become a huge number
        return features.with_columns(amount_bins(table) | self.facts.columns(table))

    def save(self, folder: Path) -> None:
        """Write vocabularies as json and numbers as npz into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_vocabularies(folder, "terms", self.blocks | {SLOPES: self.by_amount})
        np.savez(folder / "amounts.npz", mean=self.mean, deviation=self.deviation)
        self.facts.save(folder)
        self.meanings.save(folder)

    @classmethod
    def load(cls, folder: Path) -> FeatureBuilder:
        """The builder that `save` wrote; it gives every table the same numbers."""
        blocks = term_blocks()
        by_amount = slope_vectorizer()
        load_vocabularies(folder, "terms", blocks | {SLOPES: by_amount})
        with np.load(folder / "amounts.npz") as scaling:
            mean = scaling["mean"]
            deviation = scaling["deviation"]
        return cls(blocks, by_amount, mean, deviation, Facts.load(folder), Meanings.load(folder))

    def term_names(self) -> TermNames:
        """Names of the terms, in the order of their columns."""
        texts = []
        groups = []
        for block, vectorizer in self.blocks.items():
            names = vectorizer.get_feature_names_out()
            texts.append(names)
            groups.append(_groups_of(block, names))
        slopes = [f"{word} × amount" for word in self.by_amount.get_feature_names_out()]
        texts.append(np.array(slopes))
        groups.append(np.full(len(slopes), SLOPES))
        categories = self.facts.term_names()
        texts.append(np.array(categories, dtype=object))
        groups.append(np.full(len(categories), CATEGORIES))
        return TermNames(np.concatenate(texts), np.concatenate(groups))


def term_blocks() -> dict[str, TfidfVectorizer]:
    """An unfitted vectorizer for each block of terms in TEXT_OF_BLOCK, in their order."""
    return {
        "title words and pairs": word_vectorizer(ngram_range=(1, 2), min_df=2),
        "text words": word_vectorizer(min_df=3),
        "text pairs": word_vectorizer(ngram_range=(2, 2), min_df=8),
        "title pieces": piece_vectorizer(min_df=5),
    }


def slope_vectorizer() -> TfidfVectorizer:
    """Unfitted, of the title words that are multiplied by the amount."""
    return word_vectorizer(min_df=3)


def _groups_of(block: str, names: np.ndarray) -> np.ndarray:
    """The group of each term of a block, (terms,) str."""
    if block == "title pieces":  # a space in a piece is the edge of a word
        return np.full(len(names), "title pieces")
    words = "title words" if block == "title words and pairs" else "text words"
    return np.where([" " in name for name in names], "word pairs", words)
