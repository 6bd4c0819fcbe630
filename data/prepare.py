"""Read and validate the catalogue, parse its texts, deal the folds: the first stage.

    python -m data.prepare --data FOLDER --workspace OUT

FOLDER holds train.csv, test.csv and optionally images/. Nothing is written unless both tables are valid.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
from tqdm import tqdm

from contracts.catalog import CatalogReport, read_catalog
from contracts.errors import run_entry_point
from contracts.files import atomic_write, sha256_file, write_json
from contracts.splits import N_FOLDS, assign_folds, write_folds
from contracts.workspace import REPOSITORY, Workspace
from data.quantity import parse_quantity
from training.settings import parse_settings

ITEM_NAME = re.compile(r"Item Name:[ \t]*(.*)")
SAFE_FILE_NAME = re.compile(r"[\w+%@=,~-][\w+%@=,~.() -]{0,150}")


@dataclass
class PrepareSettings:
    data: str = "data/sample"
    """Folder with train.csv, test.csv and optionally images/."""
    workspace: str = str(REPOSITORY)
    """Folder that receives every artefact."""
    images: str | None = None
    """Folder of the pictures; default FOLDER/images if it exists, else data/images of the workspace."""
    skip_bad_prices: bool = False
    """Leave out training rows whose price is not a finite number above 0 instead of refusing the table."""
    seed: int = 0
    """Seed of the fold assignment."""


def entity_name(catalog_content: str) -> str:
    """The text after "Item Name:", or the first line of a text that has none."""
    if match := ITEM_NAME.search(catalog_content[:20_000]):
        return match[1].strip()
    return catalog_content.strip().split("\n", 1)[0][:500]


def image_names(links: pd.Series) -> pd.Series:
    """File name of each link: its last part; with a hash before it when two links would share the name."""
    unique = pd.Series(links[links.str.strip() != ""].unique(), dtype=str)
    names = unique.map(lambda link: unquote(urlsplit(link.strip()).path).rsplit("/", 1)[-1])
    unsafe = ~names.map(lambda name: SAFE_FILE_NAME.fullmatch(name) is not None) | names.duplicated(
        keep=False
    )
    hashed = unique.map(lambda link: sha256(link.encode()).hexdigest()[:12])
    suffix = names.map(lambda name: re.sub(r"[^\w.-]", "", name)[-40:])
    names = names.where(~unsafe, hashed + "_" + suffix)
    return links.map(dict(zip(unique, names, strict=True))).fillna("")


def prepare_rows(table: pd.DataFrame, *, description: str) -> pd.DataFrame:
    """Add entity_name, text and everything parsed from the text to a validated catalogue."""
    contents = table["catalog_content"]
    quantities = [
        parse_quantity(text) for text in tqdm(contents, desc=description, unit=" rows", mininterval=1)
    ]
    names = contents.map(entity_name)
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
    return prepared.assign(price=table["price"]) if "price" in table else prepared


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(PrepareSettings, argv, description=__doc__.split("\n")[0])
    source, workspace = Path(settings.data), Workspace(settings.workspace)
    tables, reports = {}, {}
    for split in ("train", "test"):
        tables[split], reports[split] = read_catalog(
            source / f"{split}.csv", with_price=split == "train", skip_bad_prices=settings.skip_bad_prices
        )
    links = pd.concat([tables["train"]["image_link"], tables["test"]["image_link"]], ignore_index=True)
    names = image_names(links)
    tables["train"]["image"] = names[: len(tables["train"])].to_numpy()
    tables["test"]["image"] = names[len(tables["train"]) :].to_numpy()
    prepared = {
        split: prepare_rows(table, description=f"parsing {split}.csv") for split, table in tables.items()
    }
    folds = assign_folds(prepared["train"], settings.seed)

    folder = Path(settings.images) if settings.images else source / "images"
    if not settings.images and not folder.is_dir():
        folder = workspace.root / "data" / "images"
    for split, rows in prepared.items():
        with atomic_write(workspace.path("prepared", split=split)) as file:
            rows.to_csv(file, index=False)
    write_folds(workspace.path("folds"), folds)
    present = {split: int(rows["image"].map(lambda name: bool(name) and (folder / name).is_file()).sum())
               for split, rows in prepared.items()}  # fmt: skip
    write_json(
        workspace.path("catalog"),
        {
            "images_folder": str(folder.resolve()),
            "seed": settings.seed,
            "folds": N_FOLDS,
            **{
                split: {
                    "file": str((source / f"{split}.csv").resolve()),
                    "sha256": sha256_file(source / f"{split}.csv"),
                    **asdict(reports[split]),
                    "pictures_present": present[split],
                    "without_amount": int(prepared[split]["amount"].isna().sum()),
                }
                for split in prepared
            },
        },
    )
    for split in prepared:
        print(f"{split}: {_summary(reports[split], prepared[split], present[split])}")


def _summary(report: CatalogReport, rows: pd.DataFrame, present: int) -> str:
    parts = [
        f"{report.rows} rows",
        f"{present} with a picture file",
        f"{rows['amount'].isna().sum()} without an amount",
    ]
    if report.identical_duplicates_dropped:
        parts.append(f"{report.identical_duplicates_dropped} identical duplicates dropped")
    if report.bad_prices_skipped:
        listed = ", ".join(
            f"{key} ({value!r})" for key, value in list(report.bad_prices_skipped.items())[:10]
        )
        parts.append(f"{len(report.bad_prices_skipped)} skipped for their price: {listed}")
    return ", ".join(parts)


if __name__ == "__main__":
    run_entry_point(main)
