"""What two records say about being one product, as numbers: shared words, model codes, measures, brand and price.

Each feature is a symmetric function of the two records, so a decision cannot depend on which of them comes first.
Directional values (how much of one record the other repeats) come as their smaller and their larger side. A value that
cannot be computed, such as a price ratio without prices, is NaN.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from product_matching.measures import Measure, read_measures

MAX_FIELD = 1500
"""Characters of a field that are looked at. The rest would only cost time."""
MAX_CODES = 8
"""Model codes of a record that are compared, the longest first. Every code of one meets every code of the other."""
SHORTEST_CODE = 4
SHORTEST_NUMBER = 5
"""A code of digits alone has at least five; shorter ones are mostly years, sizes and amounts."""

_WORD = re.compile(r"\w+(?:\.\d+)?")
_SQUEEZED_OUT = re.compile(r"[\W_]")

NAMES = (
    "title_similarity", "title_letters", "title_covered_min", "title_covered_max",
    "text_covered_min", "text_covered_max", "rarest_shared", "rarest_unshared_min", "rarest_unshared_max",
    "code_same", "code_length", "code_edit", "code_prefix", "code_missing", "model_same", "model_edit",
    "number_shared", "number_unshared_min", "number_unshared_max", "measure_agree", "measure_differ",
    "brand_same", "brand_missing", "price_ratio", "category_shared", "words_min", "words_max",
)  # fmt: skip
"""Names of the features, in the order of the columns of `pair_features`."""


def plain(text: str) -> str:
    """Lower case in the compatibility form of Unicode, cut to `MAX_FIELD` characters: ｍｏｄｅｌ is model."""
    return unicodedata.normalize("NFKC", text[:MAX_FIELD]).lower()


def words_of(text: str) -> list[str]:
    """Words and numbers of a text that `plain` returned; a decimal stays whole, and punctuation goes."""
    return _WORD.findall(text)


def squeeze(text: str) -> str:
    """Letters and digits alone: kx-tg9344 t becomes kxtg9344t."""
    return _SQUEEZED_OUT.sub("", text)


def model_codes(text: str) -> list[str]:
    """Words that look like a model number, squeezed, the longest first and at most `MAX_CODES`.

    A code has at least four letters and digits with one digit among them, or five digits. A measure such as 1080p or
    320gb has this form, too, and is left out.
    """
    codes = set()
    for word in text.split():
        code = squeeze(word)
        if len(code) < SHORTEST_CODE or not any(character.isdigit() for character in code):
            continue
        if code.isdigit() and len(code) < SHORTEST_NUMBER:
            continue
        if read_measures(word):
            continue
        codes.add(code[:40])
    return sorted(codes, key=lambda code: (-len(code), code))[:MAX_CODES]


@lru_cache(maxsize=200_000)
def edit_similarity(one: str, other: str) -> float:
    """1 − edit distance / length of the longer string (Levenshtein 1966), between 0 and 1."""
    if one == other:
        return 1.0
    previous = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        current = [row]
        for column, compared in enumerate(other, 1):
            replaced = previous[column - 1] + (letter != compared)
            current.append(min(replaced, previous[column] + 1, current[-1] + 1))
        previous = current
    return 1 - previous[-1] / max(len(one), len(other), 1)


def _common_prefix(one: str, other: str) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


@dataclass(frozen=True)
class Profile:
    """A record as the comparison reads it."""

    title: frozenset[str]
    """words of title, brand and model number"""
    text: frozenset[str]
    """these and the words of the description"""
    letters: frozenset[str]
    """groups of three letters of the title"""
    codes: tuple[str, ...]
    squeezed: str
    """all of it without spaces and punctuation; a model number may be written in several words"""
    model: str
    numbers: frozenset[str]
    measures: frozenset[Measure]
    brand: str
    first_words: str
    """the squeezed start of the title, where a shop without a brand column writes the brand"""
    category: frozenset[str]
    price: float

    @classmethod
    def of(cls, record: dict[str, str]) -> Profile:
        title = plain(record.get("title", ""))
        brand = plain(record.get("brand", ""))
        model = plain(record.get("model", ""))
        description = plain(record.get("description", ""))
        head = " ".join(part for part in (brand, title, model) if part)
        whole = f"{head} {description}"
        head_words = frozenset(words_of(head))
        padded = f" {' '.join(words_of(title))} "
        codes = model_codes(head)
        squeezed_model = squeeze(model)
        if len(squeezed_model) >= SHORTEST_CODE and squeezed_model not in codes:
            codes = [squeezed_model[:40], *codes]
        return cls(
            title=head_words,
            text=head_words | frozenset(words_of(description)),
            letters=frozenset(padded[i : i + 3] for i in range(len(padded) - 2)),
            codes=tuple(codes),
            squeezed=squeeze(whole),
            model=squeezed_model,
            numbers=frozenset(
                word for word in head_words if word[0].isdigit() and len(word) < SHORTEST_NUMBER
            ),
            measures=frozenset(read_measures(head)),
            brand=squeeze(brand),
            first_words=squeeze(title)[:40],
            category=frozenset(words_of(plain(record.get("category", "")))),
            price=_price(record.get("price", "")),
        )


def _price(written: str) -> float:
    found = re.search(r"\d+(?:\.\d+)?", written.replace(",", "")[:40])
    price = float(found[0]) if found else 0.0
    return price if price > 0 else math.nan  # a price of 0 means that none is known


def profiles(table: pd.DataFrame) -> list[Profile]:
    """The profile of each record of a catalogue."""
    records: list[dict[str, str]] = table.to_dict("records")
    return [Profile.of(record) for record in records]


class Vocabulary:
    """How rare each word is: its inverse document frequency ln((1 + N) / (1 + records with the word)).

    N is the number of records that were counted. A word that none of them has is as rare as a word of one record.
    """

    def __init__(self, counts: dict[str, int], records: int):
        self.counts = counts
        self.records = records

    @classmethod
    def of(cls, profiles: Iterable[Profile]) -> Vocabulary:
        counts: Counter[str] = Counter()
        records = 0
        for profile in profiles:
            counts.update(profile.text)
            records += 1
        return cls(dict(counts), records)

    def rarity(self, word: str) -> float:
        return math.log((1 + self.records) / (1 + self.counts.get(word, 1)))

    def weight(self, words: Iterable[str]) -> float:
        return sum(self.rarity(word) for word in words)

    def rarest(self, words: Iterable[str]) -> float:
        """Rarity of the rarest word relative to a word of one record; 0 without words."""
        top = math.log((1 + self.records) / 2) if self.records > 1 else 1.0
        return max((self.rarity(word) for word in words), default=0.0) / max(top, 1e-9)


def compare(one: Profile, other: Profile, vocabulary: Vocabulary) -> list[float]:
    """The features of two records, in the order of `NAMES`."""
    shared = one.title & other.title
    shared_weight = vocabulary.weight(shared)
    weight = vocabulary.weight(one.title)
    other_weight = vocabulary.weight(other.title)
    covered = _sides(_ratio(shared_weight, weight), _ratio(shared_weight, other_weight))
    # the short listing of one shop may be repeated in the description of the other
    repeated = _sides(
        _ratio(vocabulary.weight(one.title & other.text), weight),
        _ratio(vocabulary.weight(other.title & one.text), other_weight),
    )
    # a word that the other record writes apart or together is no difference
    only_one = {word for word in one.title - other.text if word not in other.squeezed}
    only_other = {word for word in other.title - one.text if word not in one.squeezed}
    numbers = _sides(
        float(sum(word in only_one for word in one.numbers)),
        float(sum(word in only_other for word in other.numbers)),
    )
    return [
        _ratio(shared_weight, math.sqrt(weight * other_weight)),
        _ratio(2 * len(one.letters & other.letters), len(one.letters) + len(other.letters)),
        *covered,
        *repeated,
        vocabulary.rarest(shared),
        *_sides(vocabulary.rarest(only_one), vocabulary.rarest(only_other)),
        *_compare_codes(one, other),
        *_compare_models(one, other),
        float(len(one.numbers & other.numbers)),
        *numbers,
        *_compare_measures(one, other),
        *_compare_brands(one, other),
        abs(math.log(one.price / other.price)),
        _shared_category(one, other),
        *_sides(float(len(one.title)), float(len(other.title))),
    ]


def _sides(one: float, other: float) -> tuple[float, float]:
    return min(one, other), max(one, other)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _compare_codes(one: Profile, other: Profile) -> list[float]:
    """Sides of which the other repeats a code, its length, best edit similarity, common prefix, sides without code."""
    same = 0
    length = 0
    for record, compared in ((one, other), (other, one)):
        found = [code for code in record.codes if code in compared.squeezed]
        same += bool(found)
        length = max([length, *map(len, found)])
    edit = 0.0
    prefix = 0.0
    for code in one.codes:
        for compared_code in other.codes:
            edit = max(edit, edit_similarity(min(code, compared_code), max(code, compared_code)))
            shorter = min(len(code), len(compared_code))
            prefix = max(prefix, _common_prefix(code, compared_code) / shorter)
    missing = (not one.codes) + (not other.codes)
    return [float(same), float(length), edit, prefix, float(missing)]


def _compare_models(one: Profile, other: Profile) -> list[float]:
    """The columns of model numbers alone: 1 if one is part of the other, and their edit similarity."""
    if not one.model or not other.model:
        return [math.nan, math.nan]
    part = one.model in other.model or other.model in one.model
    first, second = sorted((one.model[:40], other.model[:40]))
    return [float(part), edit_similarity(first, second)]


def _compare_measures(one: Profile, other: Profile) -> list[float]:
    """Kinds of measure in which the two agree, and in which they have no value in common."""
    agree = 0
    differ = 0
    kinds = {measure.kind for measure in one.measures} & {measure.kind for measure in other.measures}
    for kind in kinds:
        values = {measure.value for measure in one.measures if measure.kind == kind}
        others = {measure.value for measure in other.measures if measure.kind == kind}
        if values & others:
            agree += 1
        else:
            differ += 1
    return [float(agree), float(differ)]


def _compare_brands(one: Profile, other: Profile) -> list[float]:
    """1 if a brand is in the other record (or both titles start alike), and the number of sides without a brand."""
    missing = float((not one.brand) + (not other.brand))
    if one.brand and other.brand:
        same = one.brand in other.squeezed or other.brand in one.squeezed
    elif one.brand or other.brand:
        with_brand, without = (one, other) if one.brand else (other, one)
        same = with_brand.brand in without.squeezed
    else:
        same = _common_prefix(one.first_words, other.first_words) >= 3
    return [float(same), missing]


def _shared_category(one: Profile, other: Profile) -> float:
    if not one.category or not other.category:
        return math.nan
    return len(one.category & other.category) / len(one.category | other.category)


def pair_features(
    left: Sequence[Profile], right: Sequence[Profile], rows: np.ndarray, vocabulary: Vocabulary
) -> np.ndarray:
    """The features of n pairs, (n, len(NAMES)) float32. `rows` (n, 2) holds the places of their records."""
    features = [compare(left[i], right[j], vocabulary) for i, j in rows.tolist()]
    return np.array(features, np.float32).reshape(len(features), len(NAMES))
