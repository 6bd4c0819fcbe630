import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from word_models.meanings import (
    WINDOW,
    Meanings,
    cooccurrences,
    mean_of_known,
    topic_components,
    unit_rows,
    word_vectors,
)
from word_models.terms import WORD

DRINKS = ["sip the {} from a cup in the morning", "a warm cup of {} to sip", "brew the {} and fill the cup"]
TOOLS = [
    "turn the {} against a bolt of steel",
    "the {} of steel holds a bolt",
    "grip the {} and turn the bolt",
]


@pytest.fixture
def texts():
    """Two words for drinks and two for tools; no text holds both words of a kind."""
    return pd.Series(
        [text.format(word) for word in ("tea", "cocoa") for text in DRINKS]
        + [text.format(word) for word in ("wrench", "spanner") for text in TOOLS]
    )


def test_cooccurrences_count_pairs_within_the_window(texts):
    words = TfidfVectorizer(token_pattern=WORD, min_df=2).fit(texts)
    counted = cooccurrences(texts, words).toarray()
    expected = np.zeros_like(counted)
    for text in texts:
        known = [words.vocabulary_[word] for word in text.split() if word in words.vocabulary_]
        for i, one in enumerate(known):
            for j, other in enumerate(known):
                if i != j and abs(i - j) <= WINDOW:
                    expected[one, other] += 1
    np.testing.assert_array_equal(counted, expected)


def test_words_that_keep_the_same_company_are_close_though_they_never_meet(texts):
    words = TfidfVectorizer(token_pattern=WORD, min_df=2).fit(texts)
    vectors = word_vectors(cooccurrences(texts, words))

    def cosine(one, other):
        return vectors[words.vocabulary_[one]] @ vectors[words.vocabulary_[other]]

    assert cosine("tea", "cocoa") > cosine("tea", "spanner") + 0.2
    assert cosine("wrench", "spanner") > cosine("cocoa", "wrench") + 0.2


def test_views_know_the_words_of_the_test_table(texts):
    table = pd.DataFrame({"catalog_content": texts, "entity_name": [text.split()[2] for text in texts]})
    tables = {"train": table.iloc[:6], "test": table.iloc[6:]}
    fitted = Meanings.fit(list(tables.values()))
    views = {name: fitted.transform(part) for name, part in tables.items()}
    assert [len(view) for view in views["train"] + views["test"]] == [6] * 6
    for view in views["test"]:
        lengths = np.linalg.norm(view, axis=1)
        assert np.all((np.abs(lengths - 1) < 1e-4) | (lengths == 0))
    drink, tool = views["train"][0].mean(axis=0), views["test"][0].mean(axis=0)
    assert drink @ tool < 0  # topics part what no price has said


def test_a_row_has_the_same_views_alone_in_any_order_and_after_loading(texts, tmp_path):
    table = pd.DataFrame({"catalog_content": texts, "entity_name": [text.split()[2] for text in texts]})
    fitted = Meanings.fit([table])
    whole = fitted.transform(table)
    fitted.save(tmp_path)
    loaded = Meanings.load(tmp_path).transform(table[::-1])
    alone = fitted.transform(table.iloc[[4]])
    for view, again, row in zip(whole, loaded, alone, strict=True):
        assert np.abs(view).max() > 0
        np.testing.assert_array_equal(again[::-1], view)
        np.testing.assert_array_equal(row[0], view[4])


def test_topics_are_the_formula():
    """Against numpy's decomposition; the sign of a dimension is free, cosines of rows are not."""
    rng = np.random.default_rng(0)
    counts = np.abs(rng.normal(size=(50, 12))) * np.r_[np.full(6, 5.0), np.full(6, 0.5)]
    raw = counts @ topic_components(sparse.csr_matrix(counts))
    view = unit_rows(raw, mean_of_known(raw))
    u, strength, _ = np.linalg.svd(counts, full_matrices=False)
    found = (u * strength)[:, :11]
    expected = found / np.sqrt(found.std(axis=0))
    expected -= expected.mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(view @ view.T, expected @ expected.T, atol=0.02)


def test_word_vectors_are_the_formula():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 30, size=(12, 12)).astype(float)
    counts += counts.T
    sums = counts.sum(axis=1)
    with np.errstate(divide="ignore"):
        information = np.log(counts * (sums**0.75).sum() / np.outer(sums, sums**0.75))
    _, strength, right = np.linalg.svd(np.maximum(information, 0))
    expected = right[:11].T * np.sqrt(strength[:11])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = word_vectors(sparse.csr_matrix(counts))
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=0.02)


def test_rows_of_unknown_words_stay_zero_and_out_of_the_mean():
    matrix = np.array([[3.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    rows = unit_rows(matrix, mean_of_known(matrix))
    assert rows[2].tolist() == [0, 0]
    np.testing.assert_allclose(rows[0], -rows[1], rtol=1e-6)  # around the mean of the two that are known
