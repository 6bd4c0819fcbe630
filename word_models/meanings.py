"""What words mean, learned from the texts alone: products whose words keep the same company lie close together.

Fitted on the texts of both tables. No price is used, and a test row's words are known no less than those of a held-out
training row, so the out-of-fold score holds for test rows.

Legend: N rows of both tables, V words, D dimensions.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sparse

VIEWS = ("topics of the text", "meaning of the name", "meaning of the text")
DIMENSIONS = 200
WINDOW = 5  # words to the right that count as company
LONGEST = 500  # words of a text that are counted: descriptions repeat themselves


def meanings(tables: dict[str, pd.DataFrame], pattern: str) -> dict[str, tuple[np.ndarray, ...]]:
    """The VIEWS of each table's rows, (rows, D) float32 of length 1: topics, and mean word vectors of name and text.
    `pattern` says what a word is."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    both = pd.concat(tables.values(), ignore_index=True)
    texts, names = both["catalog_content"], both["entity_name"]
    options = {"token_pattern": pattern, "min_df": 3, "sublinear_tf": True, "dtype": np.float32}
    words = TfidfVectorizer(**options)
    by_text = words.fit_transform(texts)
    vectors = word_vectors(cooccurrences(texts, words))
    views = [
        topics(TfidfVectorizer(ngram_range=(1, 2), **options).fit_transform(texts)),
        unit_rows(words.transform(names) @ vectors),
        unit_rows(by_text @ vectors),
    ]
    ends = np.cumsum([len(table) for table in tables.values()])[:-1]
    return dict(zip(tables, zip(*(np.split(view, ends) for view in views), strict=True), strict=True))


def topics(counts: sparse.csr_matrix) -> np.ndarray:
    """(N, V) TF-IDF → (N, D) latent semantic analysis (Deerwester et al. 1990, "Indexing by latent semantic analysis"),
    each dimension divided by the root of its deviation, so that the common topics do not drown the rare ones."""
    from sklearn.decomposition import TruncatedSVD

    found = TruncatedSVD(_dimensions(counts), random_state=0).fit_transform(counts)
    return unit_rows(found / np.sqrt(found.std(axis=0) + 1e-9))


def cooccurrences(texts: pd.Series, words) -> sparse.csr_matrix:
    """(V, V) how often two words of a fitted vectorizer stand within WINDOW of each other, both ways round."""
    split, number = words.build_analyzer(), words.vocabulary_
    total = sparse.csr_matrix((len(number), len(number)), dtype=np.float32)
    for start in range(0, len(texts), 10_000):  # bounds memory
        left, right = [], []
        for text in texts.iloc[start : start + 10_000]:
            ids = np.array([number[word] for word in split(text)[:LONGEST] if word in number], dtype=np.int32)
            for distance in range(1, WINDOW + 1):
                left.append(ids[:-distance])
                right.append(ids[distance:])
        left, right = np.concatenate(left), np.concatenate(right)
        total += sparse.coo_matrix((np.ones(len(left), np.float32), (left, right)), total.shape).tocsr()
    return total + total.T


def word_vectors(company: sparse.csr_matrix) -> np.ndarray:
    """(V, V) counts → (V, D) vectors of length 1 from an SVD of positive pointwise mutual information,

        max(0, ln(n_ij · Σ s^0.75 / (s_i · s_j^0.75))),  s the row sums,

    Levy, Goldberg & Dagan 2015, "Improving distributional similarity with lessons learned from word embeddings".
    """
    from sklearn.decomposition import TruncatedSVD

    pairs, sums = company.tocoo(), np.asarray(company.sum(axis=1)).ravel()
    context = sums**0.75
    information = np.log(pairs.data * context.sum() / (sums[pairs.row] * context[pairs.col]))
    kept = information > 0
    matrix = sparse.csr_matrix((information[kept], (pairs.row[kept], pairs.col[kept])), company.shape)
    svd = TruncatedSVD(_dimensions(matrix), random_state=0).fit(matrix)
    vectors = svd.components_.T * np.sqrt(svd.singular_values_)
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def unit_rows(matrix: np.ndarray) -> np.ndarray:
    """Centre the columns, then scale rows to length 1; rows of nothing but zeros stay out of the mean and stay zero."""
    some = np.any(matrix != 0, axis=1)
    centred = np.where(some[:, None], matrix - matrix[some].mean(axis=0), 0)
    return (centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def _dimensions(matrix: sparse.csr_matrix) -> int:
    return min(DIMENSIONS, min(matrix.shape) - 1)
