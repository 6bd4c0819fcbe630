"""What the models see of a product: TF-IDF of its texts, and the parsed amounts.

Legend: N catalogue rows, V terms, S structural features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sparse

WORD = r"(?u)[^\W\d_]+|\d+(?:\.\d+)?"  # numbers stay whole: 1.5 is not 1 and 5
UNIT_KINDS = ("weight", "volume", "count", "none")
AMOUNT_BINS = np.linspace(0, 10, 21)  # of log1p(total amount)
PACK_BINS = np.log([1.5, 2.5, 3.5, 4.5, 6.5, 9, 12.5, 18, 30, 60])


@dataclass
class Features:
    """Rows in the order of the table they were made from."""

    terms: sparse.csr_matrix
    """(N, V) float32, each block of terms scaled to length 1 a row"""
    structural: np.ndarray
    """(N, S) float32, standardised on the training rows"""

    def __getitem__(self, rows: np.ndarray) -> Features:
        return Features(self.terms[rows], self.structural[rows])


def build_features(train: pd.DataFrame, test: pd.DataFrame) -> tuple[Features, Features]:
    """Features of both prepared tables. Vocabulary and scaling come from the training texts, no price is used."""
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
    fitted = [(column, vectorizer.fit(train[column])) for column, vectorizer in blocks]
    numbers = amounts(train)
    mean, deviation = numbers.mean(axis=0), numbers.std(axis=0) + 1e-6

    def features(table: pd.DataFrame) -> Features:
        terms = sparse.hstack(
            [vectorizer.transform(table[column]) for column, vectorizer in fitted], format="csr"
        )
        structural = np.hstack([(amounts(table) - mean) / deviation, amount_bins(table)])
        return Features(terms.astype(np.float32), structural.astype(np.float32))

    return features(train), features(test)


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
