"""The unit grammar: how much of what a catalogue row sells.

    python -m data.quantity train.csv      # coverage report: units read, units not read and their ids

A row ends with `Value: 72.0` and `Unit: Fl Oz`; its title often repeats the size of one item and the pack,
as in "Taco Sauce, 12 Ounce (Pack of 6)". Everything here is a table look-up or a regular expression with
bounded repeats over a capped slice of the text, so no input of any length takes more than milliseconds.

What Value means, measured on 13,030 real rows:

* weight and volume rows whose title states one size and one pack of two or more (2,911 rows): Value is the
  total in 2,583, the size of one item in 203, neither in 125. So Value is the total, unless it equals the
  stated size while the title states a pack. (The price cannot confirm it: among packs it hardly follows the total.)
* a Value that contradicts the stated size and is 1, or just the pack (76 rows), counts items in spite of its
  unit ("40 oz" with `Value: 1.0`, `Unit: Ounce`): the total is then size times pack.
* count rows with a pack: Value is the number of packs or of pieces, already the total, in 749; a bare 1,
  meaning one listing, in 110. Only that bare 1 is multiplied by the pack.
* "N count" beside a size is a pack in 68 % of rows and the pieces inside the stated size in the rest
  ("11.8 oz, 8 Count"), so it is no pack by itself; Value divided by the stated size settles it.
"""

from __future__ import annotations

import csv
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from contracts.errors import InputError, run_entry_point

MAX_TITLE = 500  # characters looked at; the longest real title has 428
MAX_LINE = 64  # characters of a Value or Unit line


@dataclass(frozen=True)
class Unit:
    """A unit of measure; `factor` converts to the canonical measure of its kind: millilitre, gram, one, metre."""

    name: str
    kind: str
    factor: float


# canonical name: kind, factor, spellings besides the name ("|" between them; plurals in s and es are implied)
_UNITS = {
    "fluid_ounce": ("volume", 29.5735295625, "fl oz|floz|fl ounce|fl|fz|oz fl|onza liquida|once liquide"),
    "millilitre": ("volume", 1.0, "milliliter|mililiter|mililitre|mililitro|millilitro|ml|mls"),
    "centilitre": ("volume", 10.0, "centiliter|centilitro|cl"),
    "decilitre": ("volume", 100.0, "deciliter|decilitro|dl"),
    "litre": ("volume", 1000.0, "liter|litro|liltre|ltr|lt|l"),
    "gallon": ("volume", 3785.411784, "gal|galon|gallone"),
    "quart": ("volume", 946.352946, "qt|quarts us"),
    "pint": ("volume", 473.176473, "pt"),
    "tablespoon": ("volume", 14.78676478125, "tbsp"),
    "teaspoon": ("volume", 4.92892159375, "tsp"),
    "ounce": ("weight", 28.349523125, "oz|ozs|onz|onza|once|onces|unze|unzen|oncia|ouce|ounze|oz wt|net oz"),
    "pound": ("weight", 453.59237, "lb|lbs|ib|libra|livre|pfund|pd|ponds|libbra"),
    "gram": ("weight", 1.0, "g|gr|gm|gms|grm|gramm|gramme|grammo|grammi|gramo|grama|grams gm"),
    "kilogram": ("weight", 1000.0, "kg|kgs|kilo|kilogramm|kilogramme|kilogramo|kilogrammo"),
    "milligram": ("weight", 0.001, "mg|mgs|miligram|milligramm|milligramme|miligramo"),
    "count": (
        "count",
        1.0,
        # packages and pieces: the seller counts them, their size is elsewhere; a cup is a K-cup or a tub
        "ct|cnt|coount|each|ea|unit|unite|unita|unidad|unidade|einheit|piece|pc|pce|pieza|peca|pezzo"
        "|pezzi|stuck|stk|stueck|pack|pk|pkg|package|packet|pouch|bag|tea bag|teabag|box|carton|case|can|jar"
        "|bottle|tin|tub|tube|cup|k cup|kcup|pod|capsule|tablet|softgel|gummy|gummies|stick|bar|roll|sheet"
        "|sachet|sleeve|tray|canister|bucket|container|bundle|set|kit|serving|ziplock bag|per box|per case"
        "|per carton|per pack|count pack",
    ),
    "dozen": ("count", 12.0, "dz|doz|docena"),
    "pair": ("count", 2.0, "pr"),
    "metre": ("length", 1.0, "meter|metro|m|mtr"),
    "centimetre": ("length", 0.01, "centimeter|centimetro|cm"),
    "millimetre": ("length", 0.001, "millimeter|milimetro|mm"),
    "inch": ("length", 0.0254, "in|inche"),
    "foot": ("length", 0.3048, "ft|feet"),
    "yard": ("length", 0.9144, "yd"),
}

_SPELLINGS = {
    spelling: Unit(name, kind, factor)
    for name, (kind, factor, others) in _UNITS.items()
    for spelling in [name.replace("_", " "), *others.split("|")]
}


@lru_cache(maxsize=4096)
def _look_up(spelling: str) -> Unit | None:
    letters = unicodedata.normalize("NFKD", spelling).encode("ascii", "ignore").decode().lower()
    words = " ".join(re.findall(r"[a-z]+", letters))
    # "ounce(s)" leaves "ounce s"; a digit means that an amount is written into the unit: not ours to guess.
    if any(character.isdigit() for character in letters):
        return None
    for ending in ("", "s", "es", " s"):
        if words.endswith(ending) and (unit := _SPELLINGS.get(words.removesuffix(ending))):
            return unit
    return None


def parse_unit(spelling: str) -> Unit | None:
    """The unit that a spelling such as "Fl. Oz", "ounce(s)" or "Gramm" means.

    Case, accents, punctuation and plurals do not matter. None for "None", "" and anything not in the table.
    """
    return _look_up(spelling) if len(spelling) <= MAX_LINE else None


@dataclass(frozen=True)
class Size:
    """A size as a title states it, e.g. 12.7 ounces."""

    amount: float
    unit: Unit


_DECIMAL = r"\d{1,3}(?:,\d{3}){1,2}(?:\.\d{1,4})?|\d{1,6}(?:[.,]\d{1,4})?|\.\d{1,4}"
_SIZE = re.compile(
    # not inside a longer number: "1.5" is not a 5, "512125" not a 125
    rf"(?<!\d)(?<!\d[.,/])(?:(?P<over>\d{{1,3}})\s?/\s?)?(?P<number>{_DECIMAL})"
    r"[\s-]{0,3}(?P<word>[a-z]{1,12})\b\.?(?:[\s.-]{0,2}(?P<next>[a-z]{1,12})\b)?",
    re.ASCII,
)
# fmt: off
# "8g protein" and "3 g net carbs" are no sizes
_NUTRITION = {
    "protein", "proteins", "sugar", "sugars", "net", "carb", "carbs", "fat", "fiber", "fibre", "collagen", "plant",
    "added", "of", "total", "caffeine", "prebiotic", "trans", "whole", "sodium", "per",
}
# a pack of twelve is not a size of twelve: parse_pack_count reads these
_PACKS = {
    "pack", "packs", "pk", "pks", "package", "packages", "case", "cases", "box", "boxes", "carton", "cartons",
    "set", "sets", "per",
}
# fmt: on


def _decimal(number: str) -> float:
    """A written number: "1,200" has a thousands comma, "7,2" a decimal comma."""
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", number):
        return float(number.replace(",", ""))
    return float(number.replace(",", "."))


def parse_size(text: str, kinds: Collection[str] = ("volume", "weight")) -> Size | None:
    """The first size of one of `kinds` in a title: "12.7 Ounce", "6 x 12 oz", "12-oz", ".8 oz", "1/2 gallon".

    Titles call fluid ounces plain ounces, so "ounce" is read as a fluid ounce when only volumes are asked
    for, and a fluid ounce as an ounce when only weights are.
    """
    for found in _SIZE.finditer(text[:MAX_TITLE].lower()):
        word, following = found["word"], found["next"] or ""
        unit = parse_unit(f"{word} {following}") or parse_unit(word)
        if unit is None or word in _PACKS or (unit.name == "gram" and following in _NUTRITION):
            continue
        if unit.name in ("ounce", "fluid_ounce") and unit.kind not in kinds:
            unit = _SPELLINGS["fl oz" if unit.name == "ounce" else "oz"]
        amount = _decimal(found["number"])
        if found["over"] and _is_fraction(int(found["over"]), amount):
            amount = int(found["over"]) / amount
        if unit.kind == "count" and ("." in found["number"] or not amount.is_integer()):
            continue  # "Keurig 2.0 K-Cups" and "1/4 sheet" count nothing
        if unit.kind in kinds and amount > 0:
            return Size(amount, unit)
    return None


def _is_fraction(over: int, under: float) -> bool:
    """ "1/2 gallon" is a fraction, "12/32 oz" is twelve of 32 ounces."""
    return under in (2, 3, 4, 8) and over < under and math.gcd(over, int(under)) == 1


_N = r"(\d{1,4})(?![\d.]*\d|\s?(?:%|(?:fl|fluid|oz|ounces?|lbs?|pounds?|g|grams?|kg|ml|l|inch|in)\b))"
_PACK_WORD = r"(?:packs?|pks?)"
_PACK_PATTERNS = [
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf"\b(?:pack|pk|case|set|box|bundle|carton)s?\sof\s?{_N}",
        r"\bpk-\s?(\d{1,4})\b",
        rf"(?<![\d.,/])(\d{{1,4}})[\s-]{{0,2}}{_PACK_WORD}\b(?!\sper\b)",
        r"(?<![\d.,/])(\d{1,4})\s?(?:(?:ct|count|packs?|pks?)\s)?(?:per|/)\s?(?:case|carton)\b",
        rf"(?<![\d.,/])(\d{{1,4}})\s?[x×]\s?(?:{_DECIMAL})\s?-?(?:fl|oz|ounces?|lbs?|pounds?|g|grams?|kg|ml|l)\b",
        r"(?:oz|ounces?|lbs?|pounds?|g|grams?|kg|ml|l)\.?\s?[x×]\s?(\d{1,4})\b",
    )
]
# Nested packs: "2 packs of 6", "6 per pack -- 4 packs per case"
_NESTED_PATTERNS = [
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf"(?<![\d.,/])(\d{{1,3}})\s?{_PACK_WORD}\sof\s?{_N}",
        r"(?<![\d.,/])(\d{1,3})\s?(?:ct\s|count\s)?per\s(?:pack|box|bag)\b[\s-]{1,4}(\d{1,3})\s\w{1,10}\sper\scase\b",
    )
]


def parse_pack_count(text: str) -> int:
    """How many items a title sells: "Pack of 6", "12-Pack", "(6 pk)", "6 per case", "6 x 12 oz"; else 1.

    A bare "6 ct" is not a pack (see the top of this file). Several different packs: the largest.
    """
    title = text[:MAX_TITLE].lower()
    packs = [int(a) * int(b) for pattern in _NESTED_PATTERNS for a, b in pattern.findall(title)]
    packs += [int(n) for pattern in _PACK_PATTERNS for n in pattern.findall(title)]
    return max(packs, default=1) or 1


@dataclass(frozen=True)
class Quantity:
    """What a row sells. Canonical measures: millilitre, gram, one, metre, by `kind`."""

    amount: float | None
    """The Value line as it stands."""
    unit: str
    """Canonical unit name of the Unit line, "" if there is none or it cannot be read."""
    kind: str
    """volume, weight, count, length, or none."""
    canonical_amount: float | None
    """`amount` in the canonical measure."""
    pack_count: int
    item_size: float | None
    """One item, canonical: from the title unless the Value contradicts it, else total / pack."""
    total_amount: float | None
    """Everything in the listing, canonical."""

    @property
    def quantity_value(self) -> float:
        return math.log1p(self.canonical_amount or 0.0)

    @property
    def unit_volume(self) -> int:
        return int(self.kind == "volume")

    @property
    def unit_weight(self) -> int:
        return int(self.kind == "weight")


def _line(text: str, label: str, *, last: bool = True) -> str:
    """What follows `label` at the start of the last (or first) line that has it; "" without one."""
    text, label = "\n" + text, "\n" + label
    at = text.rfind(label) if last else text.find(label)
    start = at + len(label)
    return "" if at < 0 else text[start : start + MAX_TITLE].split("\n", 1)[0].strip()


_VALUE = re.compile(r"(?:\d{1,18}(?:\.\d{0,32})?|\.\d{1,32})(?:e[+-]?\d{1,2})?", re.ASCII | re.IGNORECASE)


def parse_quantity(catalog_content: str) -> Quantity:
    """Read the last Value and Unit lines and the Item Name line. What cannot be read is None, "" or "none".

    A Value that is not a plain number of zero or more (None, -3, nan, inf, 1_000) is not read.
    """
    written = _line(catalog_content, "Value:")
    amount = float(written) if _VALUE.fullmatch(written) else None
    unit = parse_unit(_line(catalog_content, "Unit:"))
    title = _line(catalog_content, "Item Name:", last=False)
    pack_count = parse_pack_count(title)
    if unit is None:
        return Quantity(amount, "", "none", None, pack_count, None, None)

    canonical = None if amount is None else amount * unit.factor
    size = parse_size(title, (unit.kind,))
    stated = size.amount * size.unit.factor if size else None
    pack_count, item_size, total = _reconcile(amount, unit, stated, pack_count)
    return Quantity(amount, unit.name, unit.kind, canonical, pack_count, item_size, total)


def _reconcile(
    amount: float | None, unit: Unit, stated: float | None, pack_count: int
) -> tuple[int, float | None, float | None]:
    """pack_count, item_size and total_amount that agree; the reasons are at the top of this file.

    Args:
        amount: the Value line, in `unit`.
        stated: size of one item by the title, canonical.
        pack_count: pack by the title.
    """
    if not amount:  # no Value, or 0.0: only the title knows
        return pack_count, stated, stated and stated * pack_count
    total = amount * unit.factor
    if unit.kind == "count":
        if amount == 1 and pack_count > 1:
            return pack_count, 1.0, float(pack_count)
        if stated == 1:  # "1 Count" says nothing about a larger Value
            stated = None
    if stated is None:
        return pack_count, total / pack_count, total

    items = total / stated
    if abs(items / pack_count - 1) < 0.02:
        return pack_count, stated, total
    is_one_item = pack_count > 1 and abs(items - 1) < 0.05
    if unit.kind != "count" and (is_one_item or amount in (1, pack_count)):
        return pack_count, stated, stated * pack_count
    if round(items) > 1 and abs(items - round(items)) < 0.05:
        return round(items), stated, total
    return pack_count, total / pack_count, total


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        raise InputError("usage: python -m data.quantity <csv with sample_id and catalog_content>")
    path = Path(arguments[0])
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    csv.field_size_limit(2**31 - 1)
    units: Counter[str] = Counter()
    values = 0
    unread: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"sample_id", "catalog_content"} <= set(reader.fieldnames or ()):
            raise InputError(
                f"{path}: needs the columns sample_id and catalog_content, has {reader.fieldnames}"
            )
        for row in reader:
            quantity = parse_quantity(row["catalog_content"] or "")
            units[quantity.unit or "none"] += 1
            values += quantity.amount is not None
            if not quantity.unit:
                spelling = _line(row["catalog_content"] or "", "Unit:")[:MAX_LINE]
                unread.setdefault(spelling, []).append(row["sample_id"])
    print(f"{path}: {sum(units.values())} rows, {values} with a numeric Value")
    for name, rows in units.most_common():
        print(f"  {name:12} {rows:7}")
    print("no unit read from these spellings:" if unread else "every unit was read")
    for spelling, ids in sorted(unread.items(), key=lambda item: -len(item[1])):
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        print(f"  {spelling!r:12} {len(ids):7} rows: {', '.join(ids[:5])}{more}")


if __name__ == "__main__":
    run_entry_point(main)
