"""TF-IDF of words and of pieces of words: how texts are cut, and how a fitted vocabulary is kept.

Legend: V terms.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from contracts.files import read_json, write_json

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

WORD = r"(?u)[^\W\d_]+|\d+(?:\.\d+)?"
"""A word or a number. Numbers stay whole: 1.5 is not 1 and 5."""


def word_vectorizer(**options) -> TfidfVectorizer:
    """TF-IDF of words, by default of single ones; `options` are scikit-learn's."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(token_pattern=WORD, sublinear_tf=True, dtype=np.float32, **options)


def piece_vectorizer(**options) -> TfidfVectorizer:
    """TF-IDF of the pieces of 3 to 4 letters that words are cut into; they reach brands and spellings that are rare."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True, dtype=np.float32, **options
    )


def save_vocabularies(folder: Path, name: str, vectorizers: dict[str, TfidfVectorizer]) -> None:
    """Write <name>.json with the terms of each fitted vectorizer, in the order of their columns, and <name>.npz with
    the weights (V,) that inverse document frequency gives them."""
    terms = {block: fitted.get_feature_names_out().tolist() for block, fitted in vectorizers.items()}
    write_json(folder / f"{name}.json", terms)
    np.savez(folder / f"{name}.npz", **{block: fitted.idf_ for block, fitted in vectorizers.items()})


def load_vocabularies(folder: Path, name: str, vectorizers: dict[str, TfidfVectorizer]) -> None:
    """Give unfitted vectorizers, made with the same options, the vocabularies that `save_vocabularies` wrote."""
    terms = read_json(folder / f"{name}.json")
    with np.load(folder / f"{name}.npz") as weights:
        for block, vectorizer in vectorizers.items():
            # what fit sets: the column of each term, and its weight
            vectorizer.vocabulary_ = {term: column for column, term in enumerate(terms[block])}
            vectorizer.idf_ = weights[block]
