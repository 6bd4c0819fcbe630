"""What words mean, learned from the texts alone: products whose words occur in the same company lie close together.

The views of meaning are fitted on the texts of all tables that exist when a model is trained: train and, if there is
one, test. No price is used, and a test row's words are known exactly as a held-out training row's words are, so the
out-of-fold score holds for test rows. A table that comes later is described by the words that are known.

Legend: N rows of a table, or of all fitted ones, V words, D dimensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sparse

from word_models.terms import load_vocabularies, save_vocabularies, word_vectorizer

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

VIEWS = ("topics of the text", "meaning of the title", "meaning of the text")
DIMENSIONS = 200
MIN_TEXTS = 3
"""Texts that must have a word or a pair of words before it counts."""
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


class Meanings:
    """The VIEWS, fitted on texts; they give every table vectors in the same space.

    Topics come from the text by latent semantic analysis (Deerwester et al. 1990, "Indexing by latent semantic
    analysis"); the other two views are the mean word vectors of title and text, weighted by TF-IDF.
    """

    def __init__(
        self,
        words: TfidfVectorizer,
        words_and_pairs: TfidfVectorizer,
        vectors: np.ndarray,
        components: np.ndarray,
        means: tuple[np.ndarray, ...],
    ):
        """
        Args:
            words: fitted, V words.
            words_and_pairs: fitted, V terms of its own.
            vectors: (V, D) of the words.
            components: (V, D) of words and pairs: counts times these are the topics.
            means: of each view (D,), over the fitted rows.
        """
        self.words = words
        self.words_and_pairs = words_and_pairs
        self.vectors = vectors
        self.components = components
        self.means = means

    @classmethod
    def fit(cls, tables: list[pd.DataFrame]) -> Meanings:
        """Fit on the texts of all `tables`, prepared tables of N rows together."""
        columns = [table[["entity_name", "catalog_content"]] for table in tables]
        table = pd.concat(columns, ignore_index=True)
        words, words_and_pairs = _vectorizers()
        counts_of_pairs = words_and_pairs.fit_transform(table["catalog_content"])
        words.fit(table["catalog_content"])
        vectors = word_vectors(cooccurrences(table["catalog_content"], words))
        fitted = cls(words, words_and_pairs, vectors, topic_components(counts_of_pairs), means=())
        fitted.means = tuple(mean_of_known(view) for view in fitted._not_centred(table))
        return fitted

    def transform(self, table: pd.DataFrame) -> tuple[np.ndarray, ...]:
        """The VIEWS of a prepared table's rows, (N, D) float32, of length 1 or, where all words are unknown, 0."""
        views = self._not_centred(table)
        return tuple(unit_rows(view, mean) for view, mean in zip(views, self.means, strict=True))

    def _not_centred(self, table: pd.DataFrame) -> list[np.ndarray]:
        texts = table["catalog_content"]
        return [
            self.words_and_pairs.transform(texts) @ self.components,
            self.words.transform(table["entity_name"]) @ self.vectors,
            self.words.transform(texts) @ self.vectors,
        ]

    def save(self, folder: Path) -> None:
        """Write meanings.json (vocabularies) and two npz files."""
        vectorizers = {"words": self.words, "words and pairs": self.words_and_pairs}
        save_vocabularies(folder, "meanings", vectorizers)
        arrays: dict[str, Any] = {"vectors": self.vectors, "components": self.components}
        arrays |= {f"mean_{number}": mean for number, mean in enumerate(self.means)}
        np.savez(folder / "meanings_vectors.npz", **arrays)

    @classmethod
    def load(cls, folder: Path) -> Meanings:
        words, words_and_pairs = _vectorizers()
        load_vocabularies(folder, "meanings", {"words": words, "words and pairs": words_and_pairs})
        with np.load(folder / "meanings_vectors.npz") as arrays:
            means = tuple(arrays[f"mean_{number}"] for number in range(len(VIEWS)))
            return cls(words, words_and_pairs, arrays["vectors"], arrays["components"], means)


def _vectorizers() -> tuple[TfidfVectorizer, TfidfVectorizer]:
    """Unfitted: of words, and of words and pairs of words."""
    return word_vectorizer(min_df=MIN_TEXTS), word_vectorizer(ngram_range=(1, 2), min_df=MIN_TEXTS)


def topic_components(counts: sparse.csr_matrix) -> np.ndarray:
    """(N, V) TF-IDF → (V, D) float32 components of its SVD.

    Each dimension is divided by the square root of its deviation over the N rows, so that common topics do not drown
    rare ones.
    """
    from sklearn.decomposition import TruncatedSVD

    components = TruncatedSVD(_dimensions(counts), random_state=0).fit(counts).components_.T
    deviation = (counts @ components).std(axis=0)
    # stored by rows, so that a sparse row times the components reads only the rows of its terms
    return np.ascontiguousarray(components / np.sqrt(deviation + SMALLEST), dtype=np.float32)


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
    rows, columns = np.concatenate(left), np.concatenate(right)
    once = np.ones(len(rows), np.float32)
    return sparse.coo_matrix((once, (rows, columns)), (len(number), len(number))).tocsr()


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


def mean_of_known(matrix: np.ndarray) -> np.ndarray:
    """(N, D) → (D,) mean of the rows that are not zero. Rows of zeros are products whose words are all unknown."""
    known = np.any(matrix != 0, axis=1)
    return matrix[known].mean(axis=0) if known.any() else np.zeros(matrix.shape[1], matrix.dtype)


def unit_rows(matrix: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Subtract `mean` (D,) from each row, then scale the row to length 1, float32; rows of zeros stay zero."""
    known = np.any(matrix != 0, axis=1)
    centred = np.where(known[:, None], matrix - mean, 0)
    return unit_length(centred).astype(np.float32)


def unit_length(matrix: np.ndarray) -> np.ndarray:
    """Each row divided by its length; rows of zeros stay zero."""
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.maximum(lengths, SMALLEST)


def _dimensions(matrix: sparse.csr_matrix) -> int:
    """DIMENSIONS, or what a small matrix allows: an SVD has fewer than its rows and columns."""
    return min(DIMENSIONS, min(matrix.shape) - 1)
