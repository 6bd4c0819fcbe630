"""The model card: what a stranger has to know before using an exported system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from contracts.files import read_json
from pricing.model import PriceModel
from pricing.parts import EncoderSource

CARD = """\
---
license: {license}
library_name: product-price
tags: [price-prediction]
---

# Product prices from catalogue text

This system prices a product from its catalogue text; pictures are {pictures}. It was fitted to {rows} products with
known prices (currency: {currency}).

```python
from pricing import PriceModel
model = PriceModel.load("path/to/this/folder")
model.predict(table)        # a table with the columns {columns}
```

## Score
The error is **{score} SMAPE** (the ± is a standard error) on {scored_rows} products. {score_basis}

SMAPE is 100 · mean(|p − a| / ((|p| + |a|) / 2)) for predicted price p and actual price a. It runs from 0 to 200, and
lower is better. The price intervals covered {coverage} of these products.

## Parts
{members}

The price is the geometric mean of the members' prices with these weights. The members read these embeddings beside
words and amounts:

{encoders}

## Data
- Products in training: {rows}. The sha256 of their table is `{sha256}`.
- Names and prices of these products are {known} in this folder.

## Limits
- The score holds for products like those of the training table, at the time of its prices. Other kinds of products,
  shops, currencies or later prices have larger errors, and the intervals then cover less than they say.
- A product without a text gets a price that says little about it. The column `missing` of a prediction names what was
  absent.
- A price is an estimate of what the training catalogue would have asked. It is no advice on what to ask.

## Licence
The licence is stated as `{license}`. The weights derive from the training catalogue and from the encoders above, whose
licences apply to what is made from them.
"""

HONEST_BASIS = (
    "It is the error on products that neither the members, nor their encoders, nor the ensemble's weights have seen: "
    "each product was priced by models that were fitted without it."
)
LEAKED_BASIS = (
    "**This number is leaked**: a part of the system was fitted on the products that it was scored on, so the error on "
    "new products is higher."
)


def training_data(model: PriceModel) -> dict[str, Any]:
    """Number of products and hash of the table that the system was fitted to, without its owner's paths."""
    catalog = model.workspace.path("catalog")
    stated = read_json(catalog).get("train", {}) if catalog.is_file() else {}
    return {key: stated[key] for key in ("rows", "sha256") if key in stated}


def model_card(model: PriceModel, *, license: str, known_products: bool) -> str:
    """README.md of an export."""
    score = model.ensemble.score
    data = training_data(model)
    leaked = "leaked_smape" in score
    smape = score["leaked_smape"] if leaked else score["smape"]
    coverage = [f"{share:.1%} at nominal {level}" for level, share in score["coverage"].items()]
    return CARD.format(
        license=license,
        rows=f"{data.get('rows', score['rows']):,}",
        sha256=data.get("sha256", "unknown"),
        columns=_listed_columns(model),
        currency=model.mapping.currency,
        score=f"{smape:.2f} ± {score['standard_error']:.2f}",
        scored_rows=f"{score['rows']:,}",
        score_basis=LEAKED_BASIS if leaked else HONEST_BASIS,
        coverage=", ".join(coverage),
        members=_markdown(_members(model)),
        encoders=_markdown(_encoders(model)) if model.encoders else "(none)",
        pictures="read" if model.reads_pictures else "not read",
        known="included" if known_products else "not included",
    )


def _listed_columns(model: PriceModel) -> str:
    mapping = model.mapping
    columns = [mapping.id, *mapping.text, *([mapping.image] if mapping.image else []), *mapping.features]
    return ", ".join(f"`{column}`" for column in columns)


def _members(model: PriceModel) -> pd.DataFrame:
    lines = []
    for member, weight in zip(model.ensemble.members, model.ensemble.weights, strict=True):
        lines.append({"member": member.name, "stage": member.stage, "weight": f"{weight:.3f}"})
    return pd.DataFrame(lines)


def _encoders(model: PriceModel) -> pd.DataFrame:
    lines = [
        {"embedding": source.name, "stage": source.stage, "model": _public_name(source)}
        for source in model.encoders.values()
    ]
    return pd.DataFrame(lines)


def _public_name(source: EncoderSource) -> str:
    """A hub id, or the last parts of a local folder: where it lies is its owner's business."""
    model = str(source.meta["model"])
    return "/".join(Path(model).parts[-2:]) if model.startswith(("/", "~", ".")) else model


def _markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
