"""Price a table of products, or one product, with a saved system.

    python -m pricing.predict --model OUT --input new.parquet --output prices.parquet
    python -m pricing.predict --model OUT --text "Organic green tea, 20 bags" --image tea.jpg

The table is read, priced and written in pieces, so its size does not matter. The output appears when it is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from contracts.errors import InputError, run_entry_point
from contracts.tables import iterate_table, table_format, table_writer
from pricing.config import PredictSettings
from pricing.model import PriceModel
from pricing.products import is_prepared, products_of
from training.settings import parse_settings

WARNINGS = {
    "picture": "no usable picture, and this system was trained to look at pictures",
    "text": "no text",
    "amount": 'no amount was understood; a text that says "12 oz" or "pack of 6" has a more certain price',
}
"""What is printed for each word of the column `missing`."""


def price_table(settings: PredictSettings) -> int:
    """Price settings.input into settings.output; returns the number of rows.

    Raises:
        InputError: an output that exists, an unknown format, or whatever `PriceModel` refuses.
    """
    assert settings.input and settings.output
    _check_files(settings.input, settings.output, overwrite=settings.overwrite)
    model = PriceModel.load(settings.model, device=settings.device)
    rows = 0
    try:
        with (
            table_writer(settings.output) as writer,
            tqdm(desc="pricing", unit=" rows", mininterval=1) as progress,
        ):
            for prices in _priced_pieces(model, settings):
                writer.write(prices)
                rows += len(prices)
                progress.update(len(prices))
    except OSError as error:  # a full disk, a folder that cannot be written
        raise InputError(f"{settings.output}: {error.strerror or error}; nothing was written") from None
    print(f"{settings.output}: {rows} prices")
    return rows


def _check_files(source: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse what can be refused before a model is loaded."""
    table_format(source)
    table_format(target)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    if target.exists() and target.samefile(source):
        raise InputError(f"{target}: is the input itself; choose another --output")
    if target.exists() and not overwrite:
        raise InputError(f"{target}: exists already; --overwrite replaces it")


def _priced_pieces(model: PriceModel, settings: PredictSettings) -> Iterator[pd.DataFrame]:
    assert settings.input
    for piece in iterate_table(settings.input, settings.rows_at_once):
        # in a file, prices without ids could not be joined to anything
        if not is_prepared(piece) and model.mapping.id not in piece:
            raise InputError(
                f"{settings.input}: column {model.mapping.id} (the id) is missing; found {', '.join(piece.columns)}"
            )
        products = products_of(piece, model.mapping, source=str(settings.input))
        yield model.price(products, images=settings.images).prices


def describe_one(model: PriceModel, settings: PredictSettings) -> str:
    """The price of one product with its intervals and warnings, for people."""
    priced = model.predict_one(settings.text or "", settings.image)
    bounds = {}
    for column in ("low_80", "high_80", "low_95", "high_95"):
        bounds[column] = money(priced[column], model.mapping.currency)
    lines = [
        f"price: {money(priced['price'], model.mapping.currency)}",
        f"In 8 of 10 cases the true price lies between {bounds['low_80']} and {bounds['high_80']}, "
        f"in 19 of 20 between {bounds['low_95']} and {bounds['high_95']}.",
    ]
    missing = priced["missing"].split(", ") if priced["missing"] else []
    lines += [f"warning: {WARNINGS[word]}" for word in missing]
    return "\n".join(lines)


def money(value: float, currency: str) -> str:
    """4.5 as "$4.50" or "EUR 4.50"."""
    space = " " if len(currency) > 1 else ""
    return f"{currency}{space}{value:,.2f}"


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(PredictSettings, argv, description=__doc__.split("\n")[0])
    if settings.input:
        price_table(settings)
        return
    print(describe_one(PriceModel.load(settings.model, device=settings.device), settings))


if __name__ == "__main__":
    run_entry_point(main)
