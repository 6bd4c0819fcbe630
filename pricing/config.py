"""Settings of the commands of this package: every default once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from contracts.errors import InputError


@dataclass
class PredictSettings:
    """Settings of predict.py."""

    model: str = "."
    """Workspace, exported folder or hub id of the saved system."""
    input: Path | None = None
    """Table of products to price: .csv, .tsv, .jsonl (each also .gz) or .parquet, with the columns that the model was
    trained on, the price excepted."""
    output: Path | None = None
    """File that receives the prices, in any of these formats."""
    overwrite: bool = False
    """Replace an output that exists."""
    text: str | None = None
    """Text of one product, instead of a table: its price is printed."""
    image: Path | None = None
    """Picture of this one product."""
    images: Path | None = None
    """Folder with the pictures of the table; null takes the images folder of the workspace."""
    rows_at_once: int = 1024
    """Rows that are priced together. The number bounds memory and changes no price."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>."""

    def __post_init__(self) -> None:
        one_product = self.text is not None or self.image is not None
        if one_product and (self.input or self.output):
            raise InputError("--text and --image price one product, --input and --output a table: choose one")
        if not one_product and not (self.input and self.output):
            raise InputError("give --input and --output to price a table, or --text to price one product")
        if self.rows_at_once < 1:
            raise InputError(f"--rows-at-once {self.rows_at_once}: must be at least 1")


@dataclass
class ExportSettings:
    """Settings of export.py."""

    model: Path = Path(".")
    """Workspace of the saved system."""
    to: Path | None = None
    """Folder that receives the export."""
    overwrite: bool = False
    """Replace a folder that exists."""
    known_products: bool = True
    """Take along names and prices of the training products, and one embedding of each: `explain` shows the nearest of
    them. Without it the folder holds no price of a single product, but the models still hold what they learned."""
    license: str = "other"
    """Licence that the model card names; `other` says that it follows from the catalogue and the encoders."""

    def __post_init__(self) -> None:
        if self.to is None:
            raise InputError("--to: name the folder that receives the export")
