"""The schema: which attributes each vertical has, and which values an attribute may take.

    verticals:
      fruit:
        kind:
          question: What kind of fruit is it?
          values: {apple: [apples], pear: [pears]}     # closed, each value with its synonyms
        brand: {type: free}
        slices: {type: number}

A vertical is a kind of product, such as fruit or shoes. `unknown` is always allowed and never listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contracts.errors import InputError, listed

UNKNOWN = "unknown"
FOLDER = Path(__file__).parent / "schemas"
SETTINGS_OF_ATTRIBUTE = {"question", "values", "type"}
_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)?")


@dataclass(frozen=True)
class Attribute:
    """One attribute of one vertical."""

    vertical: str
    name: str
    kind: Literal["closed", "free", "number"]
    question: str
    values: tuple[str, ...] = ()
    """values of a closed attribute, without unknown"""
    spellings: tuple[tuple[str, str], ...] = ()
    """every accepted spelling of a closed value, normalised, with the value it stands for"""

    def canonical(self, answer: str) -> str | None:
        """The one form in which an answer is counted, or None for an answer that the schema does not allow."""
        plain = _plain(answer)
        if plain == UNKNOWN:
            return UNKNOWN
        if self.kind == "closed":
            return dict(self.spellings).get(plain)
        if self.kind == "number":
            number = _NUMBER.search(plain)
            return f"{float(number[0].replace(',', '.')):g}" if number else None
        return plain or None


@dataclass(frozen=True)
class Schema:
    """Attributes by vertical, in the order of the file."""

    verticals: dict[str, tuple[Attribute, ...]]

    @classmethod
    def read(cls, name: str) -> Schema:
        """A yaml file, or the name of one in attributes/schemas. Raises InputError naming file and attribute."""
        import yaml

        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            path = FOLDER / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
            raise InputError(f"--schema {name}: no such file; name a yaml file or one of {known}")
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not readable as yaml ({' '.join(str(error).split())[:160]})") from None
        verticals = content.get("verticals") if isinstance(content, dict) else None
        if not isinstance(verticals, dict) or not verticals:
            raise InputError(f"{path}: it needs `verticals:` with at least one vertical and its attributes")
        parsed = {}
        for vertical, attributes in verticals.items():
            if not isinstance(attributes, dict) or not attributes:
                raise InputError(f"{path}: vertical {vertical} has no attributes")
            parsed[str(vertical)] = tuple(
                _attribute(path, str(vertical), str(name), settings) for name, settings in attributes.items()
            )
        return cls(parsed)

    def attributes_of(self, vertical: str) -> tuple[Attribute, ...]:
        return self.verticals[vertical]

    def attribute(self, vertical: str, name: str) -> Attribute | None:
        """The attribute of this name, or None where the vertical has none."""
        for attribute in self.verticals[vertical]:
            if attribute.name == name:
                return attribute
        return None

    def columns(self) -> list[tuple[str, str, str, str]]:
        """(column name, vertical, attribute, value) of every closed value, in the order of the schema."""
        several = len(self.verticals) > 1
        columns = []
        for vertical, attributes in self.verticals.items():
            for attribute in attributes:
                for value in attribute.values:
                    name = f"{attribute.name}={value}"
                    columns.append(
                        (f"{vertical}.{name}" if several else name, vertical, attribute.name, value)
                    )
        return columns


def _attribute(path: Path, vertical: str, name: str, settings: Any) -> Attribute:
    place = f"{path}: {vertical}.{name}"
    if not isinstance(settings, dict):
        raise InputError(f"{place}: expected settings such as values: [red, blue] or type: free")
    if unknown := sorted(str(setting) for setting in settings if setting not in SETTINGS_OF_ATTRIBUTE):
        raise InputError(f"{place}: no setting {', '.join(unknown)}; there are question, values and type")
    if ("values" in settings) == ("type" in settings):
        raise InputError(f"{place}: give either values, or type: free or type: number")
    question = str(settings.get("question", f"What is the {name.replace('_', ' ')} of this product?"))
    if "type" in settings:
        if settings["type"] not in ("free", "number"):
            raise InputError(f"{place}: type {settings['type']}: choose free or number, or give values")
        return Attribute(vertical, name, settings["type"], question)
    values, spellings = _values(place, settings["values"])
    return Attribute(vertical, name, "closed", question, values, spellings)


def _values(place: str, given: Any) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Values of a closed attribute and their spellings. Raises InputError for a spelling of two values."""
    if isinstance(given, list):
        given = {value: None for value in given}
    if not isinstance(given, dict) or not given:
        raise InputError(f"{place}: values must be a list, or a mapping from a value to its synonyms")
    spellings: dict[str, str] = {}
    for value, synonyms in given.items():
        # yaml reads yes, no, on and 1 as something else than words
        if not isinstance(value, str):
            raise InputError(f'{place}: value {value} is not text; write it in quotes, such as "yes" or "1"')
        for spelling in (value, *(synonyms or [])):
            plain = _plain(str(spelling))
            if plain == UNKNOWN:
                raise InputError(f"{place}: {UNKNOWN} is always allowed; leave it out of the values")
            if spellings.setdefault(plain, value) != value:
                raise InputError(f"{place}: {spelling} stands for two values, {spellings[plain]} and {value}")
    return tuple(given), tuple(spellings.items())


def _plain(answer: str) -> str:
    """Lower case, single spaces, no quotes or full stop around it."""
    return " ".join(answer.casefold().split()).strip(" .,;:!\"'`*")


def describe_values(attribute: Attribute) -> str:
    """What the schema allows, for messages."""
    if attribute.kind == "closed":
        return listed([*attribute.values, UNKNOWN])
    return "a number or unknown" if attribute.kind == "number" else "any text"
