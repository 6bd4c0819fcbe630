"""Measures in a product text, such as 320gb, 1.5 tb or 7.2 megapixel, in one unit per kind.

The table holds what product titles use to tell two variants apart. It is not a grammar of quantities: no packs, no
totals. Its only task is that 1 tb and 1000gb agree, and that 4gb and 16gb do not.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Measure(NamedTuple):
    kind: str
    value: float
    """in the smallest unit of the kind in the table, rounded to three digits"""


# kind: ((spellings, factor), …)
_UNITS: dict[str, tuple[tuple[str, float], ...]] = {
    "bytes": (
        ("kb", 1e-3), ("mb|megabyte|megabytes", 1.0), ("gb|gig|gigabyte|gigabytes", 1e3),
        ("tb|terabyte|terabytes", 1e6),
    ),
    "length": (
        ("mm|millimeter|millimetre", 1.0), ("cm|centimeter|centimetre", 10.0), ("in|inch|inches|\"|''|'", 25.4),
        ("ft|foot|feet", 304.8), ("m|meter|meters|metre|metres", 1000.0), ("yd|yard|yards", 914.4),
    ),
    "pixels": (("mp|megapixel|megapixels", 1.0),),
    "lines": (("p", 1.0), ("i", 1.0)),
    "zoom": (("x", 1.0),),
    "power": (("w|watt|watts", 1.0), ("kw", 1000.0)),
    "frequency": (("hz", 1.0), ("khz", 1e3), ("mhz", 1e6), ("ghz", 1e9)),
    "voltage": (("v|volt|volts", 1.0),),
    "charge": (("mah", 1.0), ("ah", 1000.0)),
    "speed": (("rpm", 1.0),),
    "rate": (("mbps", 1.0), ("gbps", 1000.0)),
    "volume": (
        ("ml|milliliter|millilitre", 1.0), ("cl", 10.0), ("l|liter|liters|litre|litres", 1000.0),
        ("fl oz|fluid ounce", 29.57), ("gal|gallon|gallons", 3785.0), ("qt|quart", 946.0),
        ("cu ft|cubic feet", 28317.0),
    ),
    "weight": (
        ("mg", 1e-3), ("g|gram|grams", 1.0), ("kg|kilogram", 1000.0), ("oz|ounce|ounces", 28.35),
        ("lb|lbs|pound|pounds", 453.6),
    ),
    "pieces": (("pk|pack|packs|ct|count|pc|pcs|piece|pieces", 1.0),),
    "ports": (("port|ports", 1.0),),
    "licences": (("user|users|license|licenses|licence|licences", 1.0),),
}  # fmt: skip


def _by_spelling() -> dict[str, tuple[str, float]]:
    units = {}
    for kind, spellings in _UNITS.items():
        for written, factor in spellings:
            for spelling in written.split("|"):
                units[spelling] = (kind, factor)
    return units


_UNIT_OF = _by_spelling()
_ANY_UNIT = "|".join(re.escape(spelling) for spelling in sorted(_UNIT_OF, key=len, reverse=True))
# A number inside a code is no measure: neither the 35 of dmp-bd35k nor the 2 of v2.
_MEASURE = re.compile(rf"(?<![\w.\-])(\d{{1,7}}(?:\.\d{{1,3}})?)[\s-]?({_ANY_UNIT})(?![\w])")


def read_measures(text: str) -> list[Measure]:
    """All measures of a text in lower case, in its order."""
    found = []
    for number, spelling in _MEASURE.findall(text.replace("cu . ft", "cu ft").replace("cu. ft", "cu ft")):
        kind, factor = _UNIT_OF[spelling]
        found.append(Measure(kind, float(f"{float(number) * factor:.3g}")))
    return found
