"""The unit grammar: it reads how much of what a catalogue row sells.

    python -m data.quantity train.csv      # coverage report: which units were read, which were not and where

A row ends with `Value: 72.0` and `Unit: Fl Oz`; its title often repeats the size of one item and the pack,
as in "Taco Sauce, 12 Ounce (Pack of 6)". Everything here is a table look-up or a regular expression with
bounded repeats over a capped slice of the text, so an input of any length takes milliseconds at most.

What Value means was measured on 13,030 real rows:

* Weight and volume rows whose title states one size and one pack of two or more (2,911 rows): Value is the
  total in 2,583, the size of one item in 203, and neither in 125. So we take Value as the total, unless it equals
  the stated size while the title states a pack. (The price cannot confirm this: among packs it hardly follows the
  total.)
* A Value that contradicts the stated size and is 1, or equals the pack (76 rows), counts items in spite of its
  unit ("40 oz" with `Value: 1.0`, `Unit: Ounce`). The total is then the size times the pack.
* Count rows with a pack: Value is the number of packs or of pieces, and so the total, in 749 rows. It is a bare 1,
  which means one listing, in 110 rows. Only that bare 1 is multiplied by the pack.
* "N count" beside a size is a pack in 68 % of the rows and the pieces inside the stated size in the rest
  ("11.8 oz, 8 Count"). So it is not read as a pack by itself; Value divided by the stated size decides.
"""

from __future__ import annotations

import argparse
import math
import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from contracts.catalog import read_table
from contracts.errors import InputError, run_entry_point

MAX_TITLE = 500
"""Characters of a title that are looked at; the longest real title has 428."""
MAX_LINE = 64
"""Characters of a Value or Unit line that are looked at."""


@dataclass(frozen=True)
class Unit:
    """A unit of measure."""

    name: str
    """Canonical name, such as fluid_ounce."""
    kind: str
    """volume, weight, count or length."""
    factor: float
    """Canonical measures (millilitre, gram, one, metre, by `kind`) per unit."""


# canonical name: (kind, factor, spellings besides the name). "|" separates spellings; plurals in s and es are implied.
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


def _units_by_spelling() -> dict[str, Unit]:
    units = {}
    for name, (kind, factor, others) in _UNITS.items():
        unit = Unit(name, kind, factor)
        units[name.replace("_", " ")] = unit
        for spelling in others.split("|"):
            units[spelling] = unit
    return units


_SPELLINGS = _units_by_spelling()
_PLURAL_ENDINGS = ("", "s", "es", " s")  # "ounce(s)" becomes "ounce s" without its punctuation


@lru_cache(maxsize=4096)
def _look_up(spelling: str) -> Unit | None:
    # NFKD splits an accented letter into the letter and its accent, which ASCII then drops: "Stück" is "stuck"
    letters = unicodedata.normalize("NFKD", spelling).encode("ascii", "ignore").decode().lower()
    if any(character.isdigit() for character in letters):
        return None  # an amount is written into the unit, and we do not guess what it means
    words = " ".join(re.findall(r"[a-z]+", letters))
    for ending in _PLURAL_ENDINGS:
        if words.endswith(ending) and (unit := _SPELLINGS.get(words.removesuffix(ending))):
            return unit
    return None


def parse_unit(spelling: str) -> Unit | None:
    """The unit that a spelling such as "Fl. Oz", "ounce(s)" or "Gramm" means, or None if it is not in the table.

    Case, accents, punctuation and plurals do not matter.
    """
    return _look_up(spelling) if len(spelling) <= MAX_LINE else None


@dataclass(frozen=True)
class Size:
    """A size as a title states it, such as 12.7 ounces."""

    amount: float
    unit: Unit


_DECIMAL = r"\d{1,3}(?:,\d{3}){1,2}(?:\.\d{1,4})?|\d{1,6}(?:[.,]\d{1,4})?|\.\d{1,4}"
# Groups: an optional numerator `over` ("1/2 gallon"), the `number`, and one or two words that may be its unit.
_SIZE = re.compile(
    # a match does not begin inside a longer number: "1.5" is not a 5, and "512125" not a 125
    rf"(?<!\d)(?<!\d[.,/])(?:(?P<over>\d{{1,3}})\s?/\s?)?(?P<number>{_DECIMAL})"
    r"[\s-]{0,3}(?P<word>[a-z]{1,12})\b\.?(?:[\s.-]{0,2}(?P<next>[a-z]{1,12})\b)?",
    re.ASCII,
)
# fmt: off
# Words after a gram that make it a nutrition fact and no size: "8g protein", "3 g net carbs".
_NUTRITION = {
    "protein", "proteins", "sugar", "sugars", "net", "carb", "carbs", "fat", "fiber", "fibre", "collagen", "plant",
    "added", "of", "total", "caffeine", "prebiotic", "trans", "whole", "sodium", "per",
}
# Words that count as units in a Unit line, but make a pack in a title: `parse_pack_count` reads these.
_PACKS = {
    "pack", "packs", "pk", "pks", "package", "packages", "case", "cases", "box", "boxes", "carton", "cartons",
    "set", "sets", "per",
}
# fmt: on


def _parse_number(number: str) -> float:
    """The value of a written number: "1,200" has a thousands comma, "7,2" a decimal comma."""
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", number):
        return float(number.replace(",", ""))
    return float(number.replace(",", "."))


def parse_size(text: str, kinds: Collection[str] = ("volume", "weight")) -> Size | None:
    """The first size of one of `kinds` in a title: "12.7 Ounce", "6 x 12 oz", "12-oz", ".8 oz", "1/2 gallon".

    Titles often write "ounce" for a fluid ounce. So an ounce is read as a fluid ounce when `kinds` lacks weight,
    and a fluid ounce as an ounce when it lacks volume.
    """
    for found in _SIZE.finditer(text[:MAX_TITLE].lower()):
        word = found["word"]
        following = found["next"] or ""
        unit = parse_unit(f"{word} {following}") or parse_unit(word)
        if unit is None or word in _PACKS:
            continue
        if unit.name == "gram" and following in _NUTRITION:
            continue
        if unit.kind not in kinds and unit.name == "ounce":
            unit = _SPELLINGS["fl oz"]
        elif unit.kind not in kinds and unit.name == "fluid_ounce":
            unit = _SPELLINGS["oz"]

        amount = _parse_number(found["number"])
        if found["over"] and _is_fraction(int(found["over"]), amount):
            amount = int(found["over"]) / amount
        if unit.kind == "count" and ("." in found["number"] or not amount.is_integer()):
            continue  # "Keurig 2.0 K-Cups" and "1/4 sheet" count nothing
        if unit.kind in kinds and amount > 0:
            return Size(amount, unit)
    return None


_DENOMINATORS = (2, 3, 4, 8)


def _is_fraction(over: int, under: float) -> bool:
    """Whether "over/under" is a fraction, as in "1/2 gallon": "12/32 oz" means twelve items of 32 ounces."""
    return under in _DENOMINATORS and over < under and math.gcd(over, int(under)) == 1


_MEASURE = r"(?:oz|ounces?|lbs?|pounds?|g|grams?|kg|ml|l)"
_PACK_WORD = r"(?:packs?|pks?)"
_NEW_NUMBER = r"(?<![\d.,/])"  # a match does not begin inside a longer number
# A number that is no size and no share: "Pack of 6", but not "Pack of 6.25 oz bags" or "pack of 100% juice".
_ITEMS = rf"(\d{{1,4}})(?![\d.]*\d|\s?(?:%|(?:fl|fluid|inch|in|{_MEASURE})\b))"
_PACK_PATTERNS = [
    re.compile(pattern, re.ASCII)
    for pattern in (
        # "Pack of 6", "Case of 12"
        rf"\b(?:pack|pk|case|set|box|bundle|carton)s?\sof\s?{_ITEMS}",
        # "PK- 12"
        r"\bpk-\s?(\d{1,4})\b",
        # "12-Pack", "6pk"; what "6 packs per case" means is left to the next pattern
        rf"{_NEW_NUMBER}(\d{{1,4}})[\s-]{{0,2}}{_PACK_WORD}\b(?!\sper\b)",
        # "12 per case", "6/Carton", "24 ct per case"
        rf"{_NEW_NUMBER}(\d{{1,4}})\s?(?:(?:ct|count|packs?|pks?)\s)?(?:per|/)\s?(?:case|carton)\b",
        # "6 x 12 oz", "12x2.5oz"
        rf"{_NEW_NUMBER}(\d{{1,4}})\s?[x×]\s?(?:{_DECIMAL})\s?-?(?:fl|{_MEASURE})\b",
        # "70g x 5"
        rf"{_MEASURE}\.?\s?[x×]\s?(\d{{1,4}})\b",
    )
]
_NESTED_PATTERNS = [
    re.compile(pattern, re.ASCII)
    for pattern in (
        # "2 packs of 6"
        rf"{_NEW_NUMBER}(\d{{1,3}})\s?{_PACK_WORD}\sof\s?{_ITEMS}",
        # "6 per pack -- 4 packs per case"
        rf"{_NEW_NUMBER}(\d{{1,3}})\s?(?:ct\s|count\s)?per\s(?:pack|box|bag)\b"
        r"[\s-]{1,4}(\d{1,3})\s\w{1,10}\sper\scase\b",
    )
]


def parse_pack_count(text: str) -> int:
    """How many items a title sells: "Pack of 6", "12-Pack", "(6 pk)", "6 per case", "6 x 12 oz"; else 1.

    A bare "6 ct" is not a pack (see the top of this file). Of several different packs the largest counts.
    """
    title = text[:MAX_TITLE].lower()
    packs = [1]
    for pattern in _NESTED_PATTERNS:
        for outer, inner in pattern.findall(title):
            packs.append(int(outer) * int(inner))
    for pattern in _PACK_PATTERNS:
        for items in pattern.findall(title):
            packs.append(int(items))
    return max(packs)


@dataclass(frozen=True)
class Quantity:
    """What a row sells. The canonical measure is the millilitre, gram, one or metre, by `kind`."""

    amount: float | None
    """The number of the Value line as it stands."""
    unit: str
    """Canonical unit name of the Unit line; "" if there is none or it cannot be read."""
    kind: str
    """volume, weight, count, length or none."""
    canonical_amount: float | None
    """`amount` in the canonical measure."""
    pack_count: int
    """Items in the listing."""
    item_size: float | None
    """Canonical size of one item: as the title states it, or total / pack where it states none or Value contradicts."""
    total_amount: float | None
    """Canonical amount of everything in the listing."""

    @property
    def quantity_value(self) -> float:
        """Structural feature: log1p of the canonical amount, 0 when there is none."""
        return math.log1p(self.canonical_amount or 0.0)

    @property
    def unit_volume(self) -> int:
        """Structural feature: 1 for a volume, else 0."""
        return int(self.kind == "volume")

    @property
    def unit_weight(self) -> int:
        """Structural feature: 1 for a weight, else 0."""
        return int(self.kind == "weight")


def _line(text: str, label: str, *, last: bool = True) -> str:
    """What follows `label` at the start of the last (or first) line that has it; "" without one."""
    text = "\n" + text
    label = "\n" + label
    found = text.rfind(label) if last else text.find(label)
    if found < 0:
        return ""
    start = found + len(label)
    return text[start : start + MAX_TITLE].split("\n", 1)[0].strip()


_VALUE = re.compile(r"(?:\d{1,18}(?:\.\d{0,32})?|\.\d{1,32})(?:e[+-]?\d{1,2})?", re.ASCII | re.IGNORECASE)


def parse_quantity(catalog_content: str) -> Quantity:
    """Read the last Value and Unit lines and the Item Name line; of a text without the first two, the title alone.

    What cannot be read becomes None, "" or "none".
    Only a plain number of zero or more is read as a Value; None, -3, nan, inf and 1_000 are not.
    """
    written = _line(catalog_content, "Value:")
    amount = float(written) if _VALUE.fullmatch(written) else None
    unit = parse_unit(_line(catalog_content, "Unit:"))
    title = _line(catalog_content, "Item Name:", last=False)
    if not _has_line(catalog_content, "Value:") and not _has_line(catalog_content, "Unit:"):
        return _from_title(title or catalog_content.strip().split("\n", 1)[0])
    pack_count = parse_pack_count(title)
    if unit is None:
        return Quantity(
            amount=amount,
            unit="",
            kind="none",
            canonical_amount=None,
            pack_count=pack_count,
            item_size=None,
            total_amount=None,
        )

    size = parse_size(title, (unit.kind,))
    stated = size.amount * size.unit.factor if size else None
    pack_count, item_size, total = _reconcile(amount, unit, stated, pack_count)
    return Quantity(
        amount=amount,
        unit=unit.name,
        kind=unit.kind,
        canonical_amount=None if amount is None else amount * unit.factor,
        pack_count=pack_count,
        item_size=item_size,
        total_amount=total,
    )


def _has_line(text: str, label: str) -> bool:
    return text.startswith(label) or "\n" + label in text


def _from_title(title: str) -> Quantity:
    """What a title alone states, for catalogues that have no Value and Unit lines: a size, else a count."""
    pack_count = parse_pack_count(title)
    size = parse_size(title) or parse_size(title, ("count",))
    if size is None:
        return Quantity(None, "", "none", None, pack_count, None, None)
    each = size.amount * size.unit.factor
    total = each * pack_count
    return Quantity(total / size.unit.factor, size.unit.name, size.unit.kind, total, pack_count, each, total)


SAME_TOTAL_TOLERANCE = 0.02
"""Value / (size × pack) may differ from 1 by this much: titles round their sizes."""
SAME_ITEMS_TOLERANCE = 0.05
"""Value / size may differ from a whole number of items by this much."""


def _reconcile(
    amount: float | None, unit: Unit, stated: float | None, pack_count: int
) -> tuple[int, float | None, float | None]:
    """pack_count, item_size and total_amount that agree; the reasons are at the top of this file.

    Args:
        amount: the number of the Value line, in `unit`.
        stated: size of one item as the title states it, canonical.
        pack_count: pack as the title states it.
    """
    if not amount:  # no Value, or 0.0: only the title knows
        total = None if stated is None else stated * pack_count
        return pack_count, stated, total
    total = amount * unit.factor
    if unit.kind == "count":
        if amount == 1 and pack_count > 1:  # one listing
            return pack_count, 1.0, float(pack_count)
        if stated == 1:  # "1 Count" says nothing about a larger Value
            stated = None
    if stated is None:
        return pack_count, total / pack_count, total

    items = total / stated
    if abs(items / pack_count - 1) < SAME_TOTAL_TOLERANCE:  # Value is the total, as in most rows
        return pack_count, stated, total
    is_size_of_one = pack_count > 1 and abs(items - 1) < SAME_ITEMS_TOLERANCE
    is_count_of_items = amount in (1, pack_count)
    if unit.kind != "count" and (is_size_of_one or is_count_of_items):
        return pack_count, stated, stated * pack_count
    if (
        round(items) > 1 and abs(items - round(items)) < SAME_ITEMS_TOLERANCE
    ):  # Value counts a pack of its own
        return round(items), stated, total
    return pack_count, total / pack_count, total  # Value contradicts the title


LISTED_IDS = 5  # per spelling in the coverage report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Report which units of a catalogue are read and which are not."
    )
    parser.add_argument("table", type=Path, help="csv with the columns sample_id and catalog_content")
    path = parser.parse_args(argv).table
    table = read_table(path)
    if not {"sample_id", "catalog_content"} <= set(table.columns):
        raise InputError(
            f"{path}: needs the columns sample_id and catalog_content, has {', '.join(table.columns)}"
        )
    table["quantity"] = table["catalog_content"].map(parse_quantity)
    table["unit"] = [quantity.unit for quantity in table["quantity"]]
    with_value = sum(quantity.amount is not None for quantity in table["quantity"])

    print(f"{path}: {len(table)} rows, {with_value} with a numeric Value")
    for unit, rows in table["unit"].value_counts().items():
        print(f"  {unit or 'none':12} {rows:7}")
    unread = table[table["unit"] == ""]
    if unread.empty:
        print("every unit was read")
        return
    print("no unit was read from these spellings:")
    unread = unread.assign(spelling=[_line(text, "Unit:")[:MAX_LINE] for text in unread["catalog_content"]])
    for spelling, rows in unread["spelling"].value_counts().items():
        ids = unread.loc[unread["spelling"] == spelling, "sample_id"].tolist()
        more = f" and {rows - LISTED_IDS} more" if rows > LISTED_IDS else ""
        print(f"  {spelling!r:12} {rows:7} rows: {', '.join(ids[:LISTED_IDS])}{more}")


if __name__ == "__main__":
    run_entry_point(main)
