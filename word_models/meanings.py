"""What words mean, learned from the texts alone: products whose words occur in the same company lie close together.

The views of meaning are fitted on the texts of both tables. No price is used, and a test row's words are known exactly
as a held-out training row's words are, so the out-of-fold score holds for test rows.

Legend: N rows of both tables, V words, D dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sparse

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

VIEWS = ("topics of the text", "meaning of the title", "meaning of the text")
DIMENSIONS = 200
WINDOW = 5
"""Words to the right of a word that count as its company."""
MAX_WORDS = 500
"""Words of a text that are counted. Long descriptions repeat themselves."""
TEXTS_AT_ONCE = 10_000
"""Texts whose pairs of words are held in memory together."""
CONTEXT_SMOOTHING = 0.75
"""Power of the context counts (Levy, Goldberg & Dagan 2015): without it, rare words dominate mutual information."""
SMALLEST = 1e-9
"""Keeps divisors above zero: a row or a dimension of zeros stays zero."""


def meanings(tables: dict[str, pd.DataFrame], pattern: str) -> dict[str, tuple[np.ndarray, ...]]:
    """The VIEWS of each table's rows, (rows, D) float32 with rows of length 1; `pattern` says what a word is.

    Topics come from the text; the other two are the mean word vectors of title and text, weighted by TF-IDF.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    both = pd.concat(tables.values(), ignore_index=True)
    texts = both["catalog_content"]
    options = {"token_pattern": pattern, "min_df": 3, "sublinear_tf": True, "dtype": np.float32}
    words = TfidfVectorizer(**options)
    words_and_pairs = TfidfVectorizer(ngram_range=(1, 2), **options)

    counts = words.fit_transform(texts)  # (N, V)
    vectors = word_vectors(cooccurrences(texts, words))  # (V, D)
    text_topics = topics(words_and_pairs.fit_transform(texts))
    of_title = unit_rows(words.transform(both["entity_name"]) @ vectors)
    of_text = unit_rows(counts @ vectors)

    # back to the tables, which were stacked one after another
    views = {}
    start = 0
    for split, table in tables.items():
        end = start + len(table)
        views[split] = (text_topics[start:end], of_title[start:end], of_text[start:end])
        start = end
    return views


def topics(counts: sparse.csr_matrix) -> np.ndarray:
    """(N, V) TF-IDF → (N, D) latent semantic analysis (Deerwester et al. 1990, "Indexing by latent semantic analysis").

    Each dimension is divided by the square root of its deviation, so that common topics do not drown rare ones.
    """
    from sklearn.decomposition import TruncatedSVD

    found = TruncatedSVD(_dimensions(counts), random_state=0).fit_transform(counts)
    return unit_rows(found / np.sqrt(found.std(axis=0) + SMALLEST))


def cooccurrences(texts: pd.Series, words: TfidfVectorizer) -> sparse.csr_matrix:
    """(V, V) how often two words of a fitted vectorizer stand within WINDOW of each other, in either order."""
    total = sparse.csr_matrix((len(words.vocabulary_), len(words.vocabulary_)), dtype=np.float32)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        total += _pairs(texts.iloc[start : start + TEXTS_AT_ONCE], words)
    return total + total.T


def _pairs(texts: pd.Series, words: TfidfVectorizer) -> sparse.csr_matrix:
    """(V, V) how often the second word follows the first one within WINDOW words."""
    split = words.build_analyzer()
    number = words.vocabulary_
    left = []
    right = []
    for text in texts:
        known = [number[word] for word in split(text)[:MAX_WORDS] if word in number]
        ids = np.array(known, dtype=np.int32)
        # shifted against itself, the text shows all pairs of words at one distance
        for distance in range(1, WINDOW + 1):
            left.append(ids[:-distance])
            right.append(ids[distance:])
    left = np.concatenate(left)
    right = np.concatenate(right)
    once = np.ones(len(left), np.float32)
    return sparse.coo_matrix((once, (left, right)), (len(number), len(number))).tocsr()


def word_vectors(company: sparse.csr_matrix) -> np.ndarray:
    """(V, V) counts → (V, D) vectors of length 1 from an SVD of positive pointwise mutual information,

        max(0, ln(n_ij · Σ s^0.75 / (s_i · s_j^0.75))),  s the row sums,

    Levy, Goldberg & Dagan 2015, "Improving distributional similarity with lessons learned from word embeddings".
    """
    from sklearn.decomposition import TruncatedSVD

    pairs = company.tocoo()
    sums = np.asarray(company.sum(axis=1)).ravel()
    context = sums**CONTEXT_SMOOTHING
    information = np.log(pairs.data * context.sum() / (sums[pairs.row] * context[pairs.col]))
    # pairs that never meet have −∞ and stay out of the sparse matrix, like all below 0
    kept = information > 0
    matrix = sparse.csr_matrix((information[kept], (pairs.row[kept], pairs.col[kept])), company.shape)

    svd = TruncatedSVD(_dimensions(matrix), random_state=0).fit(matrix)
    # the root of the singular values, as in Levy et al.: the full values would let the first dimensions decide
    vectors = svd.components_.T * np.sqrt(svd.singular_values_)
    return unit_length(vectors).astype(np.float32)


def unit_rows(matrix: np.ndarray) -> np.ndarray:
    """Centre the columns, then scale each row to length 1, float32.

    Rows of zeros, whose words are all unknown, do not enter the mean and stay zero.
    """
    known = np.any(matrix != 0, axis=1)
    centred = np.where(known[:, None], matrix - matrix[known].mean(axis=0), 0)
    return unit_length(centred).astype(np.float32)


def unit_length(matrix: np.ndarray) -> np.ndarray:
    """Each row divided by its length; rows of zeros stay zero."""
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.maximum(lengths, SMALLEST)


def _dimensions(matrix: sparse.csr_matrix) -> int:
    """DIMENSIONS, or what a small matrix allows: an SVD has fewer than its rows and columns."""
    return min(DIMENSIONS, min(matrix.shape) - 1)
