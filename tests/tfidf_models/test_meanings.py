import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from tfidf_models.features import WORD
from tfidf_models.meanings import WINDOW, cooccurrences, meanings, topics, unit_rows, word_vectors

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
    views = meanings({"train": table.iloc[:6], "test": table.iloc[6:]}, WORD)
    assert {split: [len(view) for view in of] for split, of in views.items()} == {
        "train": [6] * 3,
        "test": [6] * 3,
    }
    for view in views["test"]:
        lengths = np.linalg.norm(view, axis=1)
        assert np.all((np.abs(lengths - 1) < 1e-4) | (lengths == 0))
    drink, tool = views["train"][0].mean(axis=0), views["test"][0].mean(axis=0)
    assert drink @ tool < 0  # topics part what no price has said


def test_common_topics_do_not_drown_rare_ones():
    rng = np.random.default_rng(0)
    counts = np.abs(rng.normal(size=(50, 12)) * np.r_[np.full(6, 5.0), np.full(6, 0.5)])
    import scipy.sparse as sparse

    view = topics(sparse.csr_matrix(counts.astype(np.float32)))
    plain = np.linalg.svd(counts, full_matrices=False)
    spread = (plain.U * plain.S)[:, :11].std(axis=0)
    assert view.std(axis=0)[1] / view.std(axis=0)[10] < spread[1] / spread[10]


def test_rows_of_unknown_words_stay_zero_and_out_of_the_mean():
    rows = unit_rows(np.array([[3.0, 0.0], [1.0, 2.0], [0.0, 0.0]]))
    assert rows[2].tolist() == [0, 0]
    np.testing.assert_allclose(rows[0], -rows[1], rtol=1e-6)  # around the mean of the two that are known
