"""Long texts as chunks of tokens.

Legend: N rows, C chunks, T tokens per chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contracts.catalog import FEATURE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 16
"""More characters than a token has on average in any script, so that the middle of a text of megabytes is cut away
before it is tokenised."""


@dataclass
class Chunker:
    """Turns the messages of a row into at most C chunks of at most T tokens.

    Messages that fit into a chunk are not divided: a turn of a dialogue starts a new chunk if it does not fit behind
    the one before. Of a text with more than C chunks the first half and the last half of C are kept: how a dialogue
    begins and how it ends says more than its middle.
    """

    tokenizer: PreTrainedTokenizerBase
    tokens: int
    """T, the special tokens included"""
    chunks: int
    """C"""

    def __post_init__(self) -> None:
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        complete = self.tokenizer("a")["input_ids"]
        start = next(at for at in range(len(complete)) if complete[at : at + len(plain)] == plain)
        self.prefix = complete[:start]
        self.suffix = complete[start + len(plain) :]
        self.room = self.tokens - len(self.prefix) - len(self.suffix)
        """tokens of text per chunk"""

    def __call__(self, messages: Sequence[str]) -> list[list[int]]:
        """Token ids of each chunk; no chunk for a row without text."""
        shortened = _without_middle(messages, self.chunks * self.tokens * CHARACTERS_PER_TOKEN)
        if not shortened:
            return []
        tokenised = self.tokenizer(shortened, add_special_tokens=False)["input_ids"]
        packed = self.pack([ids for ids in tokenised if ids])
        if len(packed) > self.chunks:
            first = (self.chunks + 1) // 2
            packed = packed[:first] + packed[len(packed) - (self.chunks - first) :]
        return [self.prefix + ids + self.suffix for ids in packed]

    def pack(self, messages: list[list[int]]) -> list[list[int]]:
        """Lay messages into chunks, one behind the other; a message longer than a chunk is divided."""
        packed: list[list[int]] = []
        for message in messages:
            if packed and len(packed[-1]) + len(message) <= self.room:
                packed[-1] = packed[-1] + message
                continue
            for start in range(0, len(message), self.room):
                packed.append(message[start : start + self.room])
        return packed


def _without_middle(messages: Sequence[str], characters: int) -> list[str]:
    """The messages, or, of more than this many characters, their beginning and their end."""
    if sum(map(len, messages)) <= characters:
        return list(messages)
    half = characters // 2
    return [*_beginning(messages, half), *_end(messages, half)]


def _beginning(messages: Sequence[str], characters: int) -> list[str]:
    kept = []
    for message in messages:
        if characters <= 0:
            break
        kept.append(message[:characters])
        characters -= len(message)
    return kept


def _end(messages: Sequence[str], characters: int) -> list[str]:
    backwards = _beginning([message[::-1] for message in reversed(messages)], characters)
    return [message[::-1] for message in reversed(backwards)]


def with_fields(messages: list[list[str]], fields: pd.DataFrame) -> list[list[str]]:
    """Each row's messages and, as one message more, its fields in words: "age: 39. division: General."."""
    written = []
    for row, own in zip(fields.to_dict("records"), messages, strict=True):
        stated = []
        for column, value in row.items():
            if value != "" and not (isinstance(value, float) and np.isnan(value)):
                shown = f"{value:g}" if isinstance(value, float) else value
                stated.append(f"{column.removeprefix(FEATURE)}: {shown}.")
        written.append([*own, " ".join(stated)] if stated else own)
    return written
