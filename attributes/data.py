"""Listings, their labels, and the check that no listing is on two sides of a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from attributes.config import MAX_PICTURES, ListingSettings
from attributes.schema import Attribute, Schema, describe_values
from contracts.errors import InputError, listed
from contracts.files import read_json, write_json
from contracts.tables import FORMATS, read_any
from contracts.workspace import Workspace

SEEN = "seen.json"
"""In a run folder: the listings that the model was trained on, by how it saw them."""
SEPARATOR = ";"
"""Between the pictures of a listing."""
TEXT_COLUMNS = ("catalog_content", "text")
PICTURE_COLUMNS = ("image", "pictures", "image_link")


@dataclass(frozen=True)
class Listing:
    """One product as it is offered."""

    sample_id: str
    vertical: str
    text: str
    pictures: tuple[str, ...]
    """file names below the folder of pictures, at most MAX_PICTURES"""


@dataclass(frozen=True)
class Label:
    """What a person says of one attribute of one listing."""

    listing: Listing
    attribute: Attribute
    value: str
    reasoning: str = ""


@dataclass(frozen=True)
class Table:
    """Listings of one table and the folder of their pictures."""

    name: str
    listings: list[Listing]
    images: Path | None

    def by_id(self) -> dict[str, Listing]:
        return {listing.sample_id: listing for listing in self.listings}


def is_file_name(listings: str) -> bool:
    """Whether --listings names a file and not a prepared table."""
    suffixes = Path(listings.removesuffix(".gz")).suffix
    return suffixes in FORMATS


def read_listings(settings: ListingSettings, schema: Schema) -> Table:
    """The table that --listings names.

    A file has the columns sample_id, text (or catalog_content), pictures (file names, separated by ";") and, where the
    schema has several verticals, vertical.

    Raises:
        InputError: no such table, no sample_id, an id twice, neither texts nor pictures, or an unknown vertical.
    """
    workspace = Workspace(settings.workspace)
    if is_file_name(settings.listings):
        path = Path(settings.listings)
        frame = read_any(path)
        name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
        images = settings.images or path.parent / "images"
    else:
        path = workspace.path("prepared", split=settings.listings)
        frame = workspace.prepared(settings.listings)
        name = settings.listings
        images = settings.images or workspace.images_folder()
    if "sample_id" not in frame:
        raise InputError(f"{path}: no column sample_id")
    if (repeated := frame["sample_id"].duplicated()).any():
        raise InputError(f"{path}: sample_id {frame['sample_id'][repeated].iloc[0]} occurs twice")
    texts = _first_column(frame, TEXT_COLUMNS)
    pictures = _first_column(frame, PICTURE_COLUMNS)
    if texts is None and pictures is None:
        raise InputError(f"{path}: neither a column text nor a column pictures")
    empty = pd.Series("", index=frame.index)
    columns = zip(
        frame["sample_id"],
        _verticals(frame, schema, path),
        empty if texts is None else texts,
        empty if pictures is None else pictures,
        strict=True,
    )
    listings = []
    for sample_id, vertical, text, names in columns:
        shown = tuple(name.strip() for name in names.split(SEPARATOR) if name.strip())
        listings.append(Listing(sample_id, vertical, text, shown[:MAX_PICTURES]))
    return Table(name, listings, images if images.is_dir() else None)


def _first_column(frame: pd.DataFrame, names: Sequence[str]) -> pd.Series | None:
    for name in names:
        if name in frame:
            return frame[name].fillna("")
    return None


def _verticals(frame: pd.DataFrame, schema: Schema, path: Path) -> list[str]:
    """The vertical of every row; a schema with a single one needs no column."""
    if "vertical" not in frame:
        if len(schema.verticals) > 1:
            raise InputError(
                f"{path}: no column vertical, and the schema has {', '.join(schema.verticals)}; add the column"
            )
        return list(schema.verticals) * len(frame)
    for vertical, sample_id in zip(frame["vertical"], frame["sample_id"], strict=True):
        if vertical not in schema.verticals:
            known = ", ".join(schema.verticals)
            raise InputError(f"{path}: vertical {vertical!r} of {sample_id} is not in the schema ({known})")
    return frame["vertical"].tolist()


def read_labels(path: Path, table: Table, schema: Schema) -> list[Label]:
    """Labels sample_id, attribute, value and, where there is one, reasoning.

    Raises:
        InputError: no labels, a label without a listing, an unknown attribute, a value that the schema does not allow,
            or two labels for one attribute.
    """
    frame = read_any(path)
    for column in ("sample_id", "attribute", "value"):
        if column not in frame:
            raise InputError(f"{path}: no column {column}; labels are sample_id, attribute, value")
    if frame.empty:
        raise InputError(f"{path}: no labels; at least one per attribute is needed")
    listings = table.by_id()
    if absent := [sample_id for sample_id in frame["sample_id"] if sample_id not in listings]:
        raise InputError(
            f"{path}: no listing in table {table.name} for the label of sample_id {listed(absent)}"
        )
    if (repeated := frame.duplicated(["sample_id", "attribute"])).any():
        first = frame[repeated].iloc[0]
        raise InputError(f"{path}: two labels for {first['attribute']} of sample_id {first['sample_id']}")
    reasonings = frame["reasoning"] if "reasoning" in frame else [""] * len(frame)
    labels = []
    for sample_id, name, value, reasoning in zip(
        frame["sample_id"], frame["attribute"], frame["value"], reasonings, strict=True
    ):
        listing = listings[sample_id]
        attribute = schema.attribute(listing.vertical, name)
        if attribute is None:
            raise InputError(
                f"{path}: sample_id {sample_id}: vertical {listing.vertical} has no attribute {name}"
            )
        canonical = attribute.canonical(value)
        if canonical is None:
            raise InputError(
                f"{path}: sample_id {sample_id}: value {value!r} of {name} is not in the schema; "
                f"it allows {describe_values(attribute)}"
            )
        labels.append(Label(listing, attribute, canonical, reasoning))
    return labels


def require_apart(parts: dict[str, Iterable[Listing]]) -> None:
    """Raise InputError where two parts share a listing, a picture or a text: the same product would be on both sides.

    Args:
        parts: listings by what they are used for, such as {"labelled": …, "test": …}.
    """
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for part, listings in parts.items():
        for listing in listings:
            keys = [("listing", listing.sample_id)]
            keys += [("picture", name) for name in listing.pictures]
            words = " ".join(listing.text.casefold().split())
            if words:
                keys.append(("text", words))
            for key in keys:
                other_part, other_id = seen.setdefault(key, (part, listing.sample_id))
                if other_part != part:
                    raise InputError(
                        f"listing {listing.sample_id} ({part}) and listing {other_id} ({other_part}) have the same "
                        f"{key[0]}; take one of them out"
                    )


def write_seen(folder: Path, parts: dict[str, Iterable[Listing]]) -> None:
    """Leave in a run folder which listings it was trained on, so that no later measurement uses them."""
    write_json(folder / SEEN, {part: [asdict(listing) for listing in own] for part, own in parts.items()})


def read_seen(folder: Path) -> dict[str, list[Listing]]:
    """Listings that a finished run was trained on, such as {"labelled": …, "unlabelled": …}."""
    seen = {}
    for part, listings in read_json(folder / SEEN).items():
        seen[part] = [Listing(**{**each, "pictures": tuple(each["pictures"])}) for each in listings]
    return seen
