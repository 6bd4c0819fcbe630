"""The first stage: read and validate a catalogue, parse its texts, deal its priced rows into folds.

    python -m data.prepare --data FOLDER --workspace OUT         # train and, if there, test; images/ beside them
    python -m data.prepare --data shop.parquet --columns id=sku text=title,description price=sell_price --workspace OUT
    python -m data.prepare --input new.csv --table new --workspace OUT       # a further table, with the same columns

Tables may be .csv, .tsv, .jsonl (each also .gz) or .parquet. Nothing is written unless every table is valid.
"""

from __future__ import annotations

import csv
import re
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
from tqdm import tqdm

from contracts.catalog import FEATURE, CatalogReport, ColumnMapping, map_catalog, read_table
from contracts.errors import InputError, listed, run_entry_point
from contracts.files import atomic_write, read_json, sha256_file, write_json
from contracts.splits import N_FOLDS, assign_folds, write_folds
from contracts.tables import FORMATS, read_any
from contracts.workspace import REPOSITORY, Workspace
from data.quantity import parse_quantity
from training.settings import parse_settings

ITEM_NAME = re.compile(r"Item Name:[ \t]*(.*)")
ITEM_NAME_WITHIN = 20_000
"""Characters of a text in which "Item Name:" is looked for."""
LONGEST_NAME = 500
"""Characters of a name that is taken from the first line of a text."""
SAFE_FILE_NAME = re.compile(r"[\w+%@=,~-][\w+%@=,~.() -]{0,150}")
HASH_DIGITS = 12
"""Hexadecimal digits of a link's sha256 in the file name of its picture."""
SUFFIX_LENGTH = 40
"""Characters of the original name that are kept behind the hash."""
CATALOG_KEYS = ("images_folder", "seed", "folds", "columns", "features", "decimal", "currency")
"""What data/catalog.json says of the whole catalogue, beside one entry per table."""


@dataclass
class PrepareSettings:
    data: Path = Path("data/sample")
    """Folder with the tables train and, optionally, test, and optionally images/; or one file, the priced table."""
    input: Path | None = None
    """A further table to price, read by the columns of the training table; --table names it."""
    table: str = ""
    """Name of the further table in the files of all stages."""
    workspace: Path = REPOSITORY
    """Folder that receives every artefact."""
    columns: tuple[str, ...] = ()
    """Which column is which, such as id=sku text=title,description price=sell_price image=image_url; without image
    there are no pictures. Empty: sample_id, catalog_content, price and image_link."""
    features: tuple[str, ...] = ()
    """Columns with further facts, numbers or categories, such as weight_kg brand."""
    decimal: str = "."
    """What stands before the cents of a price: . or ,"""
    currency: str = "$"
    """How prices are labelled."""
    images: Path | None = None
    """Folder of the pictures; by default images/ beside the tables if it exists, else data/images of the workspace."""
    skip_bad_prices: bool = False
    """Leave out training rows whose price is not a finite number above 0, instead of refusing the table."""
    seed: int = 0
    """Seed of the fold assignment."""

    def __post_init__(self) -> None:
        if (self.input is None) != (self.table == ""):
            raise InputError("--input and --table go together: the file, and the name of the further table")
        if self.table == "train":
            raise InputError("--table train: give the priced table as --data FILE")
        if self.table in CATALOG_KEYS:
            raise InputError(
                f"--table {self.table}: data/catalog.json uses this word itself; choose another name"
            )
        if self.input is not None and (self.columns or self.features):
            raise InputError("--input: the columns of the training table are used again; leave --columns out")


def entity_name(catalog_content: str) -> str:
    """The text after "Item Name:", or the first line of a text that has none."""
    if match := ITEM_NAME.search(catalog_content[:ITEM_NAME_WITHIN]):
        return match[1].strip()
    first_line = catalog_content.strip().split("\n", 1)[0]
    return first_line[:LONGEST_NAME]


def image_names(links: pd.Series, known: dict[str, str] | None = None) -> pd.Series:
    """File name of the picture behind each link, "" for no link; one link always has one name.

    The name is the last part of the link. A hash of the link is put before it when the name is not safe as a file name
    or when two links would share it.

    Args:
        known: names that links of earlier tables have; they stay, and no other link gets one of them.
    """
    names = dict(known or {})
    taken = set(names.values())
    distinct = [link for link in links.unique() if link.strip() and link not in names]
    plain = pd.Series([_last_part(link) for link in distinct], dtype=str)
    shared = plain.duplicated(keep=False) | plain.isin(taken)
    for link, name, is_shared in zip(distinct, plain, shared, strict=True):
        is_safe = SAFE_FILE_NAME.fullmatch(name) is not None
        names[link] = name if is_safe and not is_shared else _hashed_name(link, name)
    return links.map(lambda link: names.get(link, "")).astype(str)


def _last_part(link: str) -> str:
    try:
        return unquote(urlsplit(link.strip()).path).rsplit("/", 1)[-1]
    except ValueError:
        return ""  # http://[bad is no link; its row has no picture


def _hashed_name(link: str, name: str) -> str:
    digest = sha256(link.encode()).hexdigest()[:HASH_DIGITS]
    suffix = re.sub(r"[^\w.-]", "", name)[-SUFFIX_LENGTH:]
    return f"{digest}_{suffix}"


def prepare_rows(table: pd.DataFrame, *, description: str) -> pd.DataFrame:
    """Add entity_name, text and everything that is parsed from the text to a validated catalogue.

    Args:
        table: catalogue rows with their picture's file name in column `image`.
        description: what the progress bar says.
    """
    contents = table["catalog_content"]
    names = contents.map(entity_name)
    progress = tqdm(contents, desc=description, unit=" rows", mininterval=1, delay=2)
    quantities = [parse_quantity(text) for text in progress]
    prepared = pd.DataFrame(
        {
            "sample_id": table["sample_id"],
            "entity_name": names,
            "catalog_content": contents,
            "text": names + " [SEP] " + contents,
            "image_link": table["image_link"],
            "image": table["image"],
            "amount": [quantity.amount for quantity in quantities],
            "unit": [quantity.unit for quantity in quantities],
            "unit_kind": [quantity.kind for quantity in quantities],
            "pack_count": [quantity.pack_count for quantity in quantities],
            "item_size": [quantity.item_size for quantity in quantities],
            "total_amount": [quantity.total_amount for quantity in quantities],
            "quantity_value": [quantity.quantity_value for quantity in quantities],
            "unit_volume": [quantity.unit_volume for quantity in quantities],
            "unit_weight": [quantity.unit_weight for quantity in quantities],
        }
    )
    for column in table.columns[table.columns.str.startswith(FEATURE)]:
        prepared[column] = table[column]
    if "price" in table:
        prepared["price"] = table["price"]
    return prepared


def prepare_table(
    raw: pd.DataFrame, mapping: ColumnMapping, *, with_price: bool = False, source: str = "table"
) -> tuple[pd.DataFrame, CatalogReport]:
    """A table of texts as stages read it, without any file: for products that are priced in memory.

    Args:
        raw: every column str.
        source: what errors call the table.
    """
    table, _, report = map_catalog(raw, source, mapping, with_price=with_price)
    table["image"] = image_names(table["image_link"])
    return prepare_rows(table, description=f"parsing {source}"), report


def write_prepared(path: Path, rows: pd.DataFrame) -> None:
    """Write a prepared table and read it back before it takes its name.

    Text is quoted: a bare carriage return would otherwise split a row in two, and nobody would be told.

    Raises InputError if a text does not come back as it was.
    """
    with atomic_write(path) as file:
        rows.to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC)
        file.flush()
        back = read_table(Path(file.name))
        for column in ("sample_id", "catalog_content", "image_link"):
            if back[column].tolist() != rows[column].tolist():
                raise InputError(f"{path}: a text of column {column} does not survive being written as csv")


@dataclass
class Source:
    """A table as it was found."""

    name: str
    file: Path
    rows: pd.DataFrame
    report: CatalogReport


def write_table(workspace: Workspace, source: Source, prepared: pd.DataFrame) -> None:
    """The prepared rows, one per product, and the ids of all lines where a product has several."""
    write_prepared(workspace.path("prepared", split=source.name), prepared)
    input_ids = workspace.path("input_ids", split=source.name)
    if source.report.input_ids:
        with atomic_write(input_ids) as file:
            pd.DataFrame({"sample_id": source.report.input_ids}).to_csv(file, index=False)
    else:
        input_ids.unlink(missing_ok=True)


def prepare_catalogue(settings: PrepareSettings) -> None:
    """The training table and, if there is one, the test table: prepared rows, folds and data/catalog.json."""
    workspace = Workspace(settings.workspace)
    mapping = ColumnMapping.parse(
        settings.columns, features=settings.features, decimal=settings.decimal, currency=settings.currency
    )
    tables = find_tables(settings.data)
    stale = workspace.path("prepared", split="test")
    if "test" not in tables and stale.is_file():
        # later stages would price it by models of a catalogue that it does not belong to
        raise InputError(f"{stale}: an earlier catalogue's, and this one has no test; use another workspace")
    sources = []
    for name, file in tables.items():
        rows, mapping, report = map_catalog(
            read_any(file),
            str(file),
            mapping,
            with_price=name == "train",
            skip_bad_prices=settings.skip_bad_prices,
        )
        sources.append(Source(name, file, rows, report))
    # all tables at once: a link that occurs in two has one picture, and two links never share a file name
    links = pd.concat([source.rows["image_link"] for source in sources], ignore_index=True)
    names = dict(zip(links, image_names(links), strict=True))
    prepared = {}
    for source in sources:
        source.rows["image"] = source.rows["image_link"].map(names)
        prepared[source.name] = prepare_rows(source.rows, description=f"parsing {source.file.name}")
    folds = assign_folds(prepared["train"], settings.seed)

    images_folder = _images_folder(settings)
    catalog = {"images_folder": str(images_folder.resolve()), "seed": settings.seed, "folds": N_FOLDS}
    catalog |= mapping.to_json()
    for source in sources:
        write_table(workspace, source, prepared[source.name])
        catalog[source.name] = describe(source, prepared[source.name], images_folder)
    write_folds(workspace.path("folds"), folds)
    write_json(workspace.path("catalog"), catalog)


def prepare_further_table(settings: PrepareSettings, file: Path) -> None:
    """One more table, by the columns that data/catalog.json has of the training table."""
    workspace = Workspace(settings.workspace)
    catalog = read_json(workspace.path("catalog"))
    mapping = ColumnMapping.from_json(catalog)
    rows, _, report = map_catalog(read_any(file), str(file), mapping, with_price=False)
    known: dict[str, str] = {}
    for name in ("train", "test"):
        if workspace.path("prepared", split=name).is_file():
            earlier = workspace.prepared(name)
            known |= dict(zip(earlier["image_link"], earlier["image"], strict=True))
    known.pop("", None)
    rows["image"] = image_names(rows["image_link"], known)
    source = Source(settings.table, file, rows, report)
    prepared = prepare_rows(rows, description=f"parsing {file.name}")
    write_table(workspace, source, prepared)
    images_folder = settings.images or Path(catalog["images_folder"])
    catalog[settings.table] = describe(source, prepared, images_folder)
    write_json(workspace.path("catalog"), catalog)


def find_tables(data: Path) -> dict[str, Path]:
    """The files of train and test: `data` itself is train if it is a file, else both lie in it in any format.

    Raises InputError: no train, or one of them in two formats.
    """
    if data.is_file():
        return {"train": data}
    found = {}
    for name in ("train", "test"):
        endings = [ending + zipped for ending in FORMATS for zipped in ("", ".gz")]
        files = [data / f"{name}{ending}" for ending in endings if (data / f"{name}{ending}").is_file()]
        if len(files) > 1:
            raise InputError(
                f"{data}: {name} is there twice: {', '.join(file.name for file in files)}; keep one"
            )
        if files:
            found[name] = files[0]
    if "train" not in found:
        raise InputError(f"{data / 'train.csv'}: no such file, nor a table train in another format")
    return found


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(PrepareSettings, argv, description=__doc__.split("\n")[0])
    if settings.input is None:
        prepare_catalogue(settings)
    else:
        prepare_further_table(settings, settings.input)


def _images_folder(settings: PrepareSettings) -> Path:
    if settings.images is not None:
        return settings.images
    folder = settings.data.parent if settings.data.is_file() else settings.data
    beside_tables = folder / "images"
    return beside_tables if beside_tables.is_dir() else settings.workspace / "data" / "images"


def describe(source: Source, prepared: pd.DataFrame, images_folder: Path) -> dict:
    """What data/catalog.json says of one table; the same is printed."""
    counts = asdict(source.report)
    del counts["input_ids"]  # a line each, which data/input_ids_<table>.csv holds
    found = {
        "file": str(source.file.resolve()),
        "sha256": sha256_file(source.file),
        **counts,
        "pictures_present": _count_pictures(images_folder, prepared["image"]),
        "without_amount": int(prepared["amount"].isna().sum()),
    }
    print(f"{source.name}: {_summary(source.report, found)}")
    return found


def _count_pictures(folder: Path, images: pd.Series) -> int:
    """Rows whose picture file exists."""
    return sum((folder / image).is_file() for image in images if image)


def _summary(report: CatalogReport, found: dict) -> str:
    parts = [
        f"{report.rows} rows",
        f"{found['pictures_present']} with a picture file",
        f"{found['without_amount']} without an amount",
    ]
    if report.identical_duplicates_dropped:
        parts.append(f"{report.identical_duplicates_dropped} repeated lines, each product priced once")
    if skipped := report.bad_prices_skipped:
        rows = [f"{sample_id} ({price!r})" for sample_id, price in skipped.items()]
        parts.append(f"{len(skipped)} skipped for their price: {listed(rows)}")
    for name, count in report.unread_features.items():
        parts.append(f"{count} whose {name} is no number")
    return ", ".join(parts)


if __name__ == "__main__":
    run_entry_point(main)
