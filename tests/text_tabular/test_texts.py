"""Chunks: turns stay whole, the middle goes, padding has no say."""

import pandas as pd
import pytest

from text_tabular.encoder import train_tokenizer
from text_tabular.texts import CHARACTERS_PER_TOKEN, Chunker, with_fields

WORDS = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS] * 5)


def words(chunker, messages):
    """The chunks as words, without the special tokens."""
    return [chunker.tokenizer.decode(chunk, skip_special_tokens=True) for chunk in chunker(messages)]


def test_each_chunk_has_the_special_tokens_and_no_more_than_its_size(tokenizer):
    chunks = Chunker(tokenizer, tokens=8, chunks=9)([WORDS] * 3)
    assert all(len(chunk) <= 8 for chunk in chunks)
    for chunk in chunks:
        assert (chunk[0], chunk[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_turns_share_a_chunk_where_they_fit_and_are_not_divided(tokenizer):
    chunker = Chunker(tokenizer, tokens=8, chunks=9)  # room for six words
    assert words(chunker, ["one two three", "four five", "six seven", "eight"]) == [
        "one two three four five", "six seven eight",
    ]  # fmt: skip


def test_a_turn_longer_than_a_chunk_is_divided(tokenizer):
    assert words(Chunker(tokenizer, tokens=8, chunks=9), [WORDS]) == [
        "one two three four five six",
        "seven eight nine ten",
    ]


@pytest.mark.parametrize(("chunks", "kept"), [(1, ["one"]), (2, ["one", "ten"]), (3, ["one", "two", "ten"])])
def test_of_a_long_text_the_middle_is_left_out(tokenizer, chunks, kept):
    chunker = Chunker(tokenizer, tokens=8, chunks=chunks)
    turns = [" ".join([word] * 6) for word in WORDS.split()]
    assert [chunk.split()[0] for chunk in words(chunker, turns)] == kept


def test_no_text_has_no_chunks(tokenizer):
    chunker = Chunker(tokenizer, tokens=8, chunks=2)
    assert chunker([]) == []
    assert chunker([""]) == []


@pytest.mark.parametrize(
    "messages", [["one " * 1_250_000 + "ten " * 1_250_000], ["one"] * 900_000 + ["ten"] * 900_000]
)
def test_of_ten_megabytes_only_the_beginning_and_the_end_are_tokenised(tokenizer, monkeypatch, messages):
    chunker = Chunker(tokenizer, tokens=8, chunks=2)
    seen = []

    def counting(texts, **options):
        seen.append(sum(map(len, texts)))
        return tokenizer(texts, **options)

    monkeypatch.setattr(chunker, "tokenizer", counting)
    first, last = chunker(messages)
    assert seen[0] <= 2 * 8 * CHARACTERS_PER_TOKEN
    assert tokenizer.decode(first[1:2]) == "one"
    assert tokenizer.decode(last[-2:-1]) == "ten"


def test_fields_become_a_sentence_each():
    fields = pd.DataFrame({"feature_age": [39.0, float("nan")], "feature_shop": ["north", ""]})
    assert with_fields([["hello"], ["hello"]], fields) == [["hello", "age: 39. shop: north."], ["hello"]]
