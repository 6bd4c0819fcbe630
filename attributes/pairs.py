"""Preference pairs from chains that disagree (arXiv 2507.19679).

Of a question whose chains agree well enough, the chains with the consensus answer are preferred and all others are
dispreferred: those with another answer, without one, and truncated ones. Each dispreferred chain is paired with one
preferred chain of the same question, chosen at random.

A question whose chains all agree has no dispreferred chain and gives no pair, although its label is the most reliable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attributes.chains import Chain, Question
from attributes.shards import Answered


@dataclass(frozen=True)
class Pair:
    """Two chains of one question, as they were sampled."""

    question: Question
    preferred: Chain
    dispreferred: Chain
    consistency: float


@dataclass(frozen=True)
class Example:
    """One chain to imitate."""

    question: Question
    reply: tuple[int, ...]


@dataclass(frozen=True)
class Preferences:
    """What a table of chains gives to learn from."""

    pairs: list[Pair]
    unanimous: list[Example]
    """one chain, chosen at random, of every question whose chains all agree"""
    questions: int
    """all questions that have chains"""
    kept: int
    """questions with a consensus that is consistent enough, the unanimous ones included"""

    def describe(self) -> str:
        return (
            f"{self.questions} questions: {self.kept} are consistent enough, {len(self.unanimous)} of them unanimous; "
            f"{len(self.pairs)} pairs"
        )


def build_preferences(answered: Sequence[Answered], *, min_consistency: float, seed: int) -> Preferences:
    """Pairs and unanimous chains, in the order of the questions; the choice depends on seed and question alone."""
    pairs: list[Pair] = []
    unanimous: list[Example] = []
    asked = 0
    kept = 0
    for each in answered:
        if not each.chains:
            continue
        asked += 1
        agreed = each.consensus
        if agreed.value is None or agreed.consistency < min_consistency:
            continue
        kept += 1
        preferred = [chain for chain in each.chains if chain.answer == agreed.value and not chain.truncated]
        dispreferred = [chain for chain in each.chains if chain.answer != agreed.value]
        generator = _generator(seed, each.question)
        if agreed.unanimous:
            chosen = preferred[generator.integers(len(preferred))]
            unanimous.append(Example(each.question, chosen.ids))
        for chain in dispreferred:
            chosen = preferred[generator.integers(len(preferred))]
            pairs.append(Pair(each.question, chosen, chain, agreed.consistency))
    return Preferences(pairs, unanimous, asked, kept)


def _generator(seed: int, question: Question) -> np.random.Generator:
    digest = hashlib.sha256("\n".join(question.key).encode()).digest()
    return np.random.default_rng([seed, *digest])
