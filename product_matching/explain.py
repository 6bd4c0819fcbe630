"""Why a pair was decided so: the change of the match's log odds when a field or a word is taken out of both records.

This is occlusion (Zeiler and Fergus 2014, https://arxiv.org/abs/1311.2901). A positive effect speaks for a match:
without this part the pair would be less probable. Effects need not add up, since two parts may say the same thing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from product_matching.catalogue import PAIR_FIELDS
from product_matching.decision import DecisionModel

MAX_WORDS = 24
"""Words of both titles and model numbers that are taken out one by one, those that a reader sees first."""
SHOWN = 3
"""Parts named for each side in `in_words`."""
NEGLIGIBLE = 0.1
"""Effects below this (in log odds) are not named."""


@dataclass(frozen=True)
class Effect:
    """One part of the records, and what it does to the decision."""

    part: str
    """a field, such as price, or a word in quotes"""
    change: float
    """log odds with the part minus log odds without it; above 0 it speaks for a match"""


def explain(model: DecisionModel, left: dict[str, str], right: dict[str, str]) -> list[Effect]:
    """The effects of all fields and of the first words, the largest first.

    Args:
        left, right: records by column; a swap of the two changes nothing.
    """
    parts = [field for field in PAIR_FIELDS if left.get(field) or right.get(field)]
    words = _words(left, right)
    lefts = [
        left,
        *(_without_field(left, field) for field in parts),
        *(_without_word(left, word) for word in words),
    ]
    rights = [
        right,
        *(_without_field(right, field) for field in parts),
        *(_without_word(right, word) for word in words),
    ]
    left_records = model.records(pd.DataFrame(lefts).fillna(""))
    right_records = model.records(pd.DataFrame(rights).fillna(""))
    rows = np.repeat(np.arange(len(lefts))[:, None], 2, axis=1)
    # the cross-encoder reads either all variants or none, or a step of the cascade would pass for an effect
    was_read = ~np.isnan(model.evidence(left_records, right_records, rows[:1]).cross)
    verdicts = model.decide(left_records, right_records, rows, read=np.repeat(was_read, len(rows)))
    probability = np.clip(verdicts.probability, 1e-6, 1 - 1e-6)
    log_odds = np.log(probability / (1 - probability))
    names = [*parts, *(f'"{word}"' for word in words)]
    effects = [
        Effect(name, float(log_odds[0] - value)) for name, value in zip(names, log_odds[1:], strict=True)
    ]
    return sorted(effects, key=lambda effect: -abs(effect.change))


def in_words(effects: list[Effect]) -> str:
    """One line, such as: for: model (+2.1), "w120" (+1.9); against: price (−0.4)."""
    said = []
    for title, sign in (("for", 1), ("against", -1)):
        parts = [effect for effect in effects if sign * effect.change >= NEGLIGIBLE][:SHOWN]
        if parts:
            listed = ", ".join(f"{effect.part} ({effect.change:+.1f})" for effect in parts)
            said.append(f"{title}: {listed}".replace("-", "−") if sign < 0 else f"{title}: {listed}")
    return "; ".join(said) or "no single part decides"


def _words(left: dict[str, str], right: dict[str, str]) -> list[str]:
    """The distinct words of both titles and model numbers in lower case, in turn from either side."""
    sides = [
        f"{record.get('title', '')} {record.get('model', '')}"[:2000].lower().split()
        for record in (left, right)
    ]
    in_turn = []
    for place in range(max(map(len, sides))):
        in_turn += [side[place] for side in sides if place < len(side)]
    distinct = dict.fromkeys(word for word in in_turn if re.search(r"\w", word))
    return list(distinct)[:MAX_WORDS]


def _without_field(record: dict[str, str], field: str) -> dict[str, str]:
    return {**record, field: ""}


def _without_word(record: dict[str, str], word: str) -> dict[str, str]:
    changed = dict(record)
    for field in ("title", "model"):
        kept = [written for written in record.get(field, "").split() if written.lower() != word]
        changed[field] = " ".join(kept)
    return changed
