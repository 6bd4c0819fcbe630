"""The fields by which a product is described, from the columns that the model was trained on.

A model has one or more columns of text and perhaps columns of further facts. Besides these, every model understands
the words of FIELDS. A column of the model comes first where both have a name in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, create_model

from contracts.catalog import ColumnMapping, parse_price
from serving.schemas import Column

FIELDS = {
    "text": "everything that is known of the product, in one text",
    "title": "name of the product",
    "bullets": "selling points, one per line",
    "description": "description of the product",
    "value": "amount that is sold, a number such as 12",
    "unit": "unit of the amount, such as Fl Oz",
}
LABELS = {
    "title": "Name",
    "bullets": "Selling points, one per line",
    "description": "Description",
    "value": "Amount",
    "unit": "Unit of the amount",
}
"""What the page calls the words of FIELDS."""
PICTURE, PICTURE_URL, EXPLAIN = "picture", "picture_url", "explain"
LISTED_VALUES = 200
"""Most values of a category that a page is given to choose from."""
NOTHING_SAID = "title: describe the product; a text, a title or a picture is needed"

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Written = StrictStr | StrictInt | Number


@dataclass(frozen=True)
class Described:
    """A product as the model thread takes it."""

    text: str
    facts: dict[str, str]
    """by the name of the column, as they are written"""
    picture: Path | None = None
    explain: bool = True
    warnings: tuple[str, ...] = ()


class ProductForm:
    """The fields of one model, as a schema and for the page.

    Args:
        categories: the known values of each category, the most frequent first.
    """

    def __init__(
        self,
        mapping: ColumnMapping,
        categories: Mapping[str, list[str]],
        *,
        reads_pictures: bool,
        picture_urls: bool,
    ):
        self.mapping = mapping
        self.categories = categories
        self.reads_pictures = reads_pictures
        self.picture_urls = picture_urls
        # the reference task has one column, and what is inside it has names of its own
        is_reference = mapping.text == ColumnMapping().text
        self.text_columns = () if is_reference else mapping.text
        own = {*self.text_columns, *mapping.features}
        self.standard = {name: meaning for name, meaning in FIELDS.items() if name not in own}
        self.names = [*self.text_columns, *self.standard, *mapping.features]
        self.schema = self._schema()

    def _schema(self) -> type[BaseModel]:
        """A pydantic model with one optional field per column. Columns may have any name, so they are aliases."""
        meanings = {name: "column of the model" for name in self.names} | self.standard
        for name, kind in self.mapping.features.items():
            meanings[name] = f"column of the model, a {kind}"
        fields: dict[str, Any] = {}
        for number, name in enumerate(self.names):
            fields[f"column_{number}"] = (Written | None, Field(None, alias=name, description=meanings[name]))
        return create_model("Product", __config__=ConfigDict(extra="forbid"), **fields)

    def columns(self) -> list[Column]:
        """What the page asks for."""
        labels = {name: _label(name) for name in self.text_columns} or LABELS
        columns = [Column(name=name, label=label, kind="text") for name, label in labels.items()]
        for name, kind in self.mapping.features.items():
            values = self.categories.get(name, [])[:LISTED_VALUES] if kind == "category" else None
            columns.append(Column(name=name, label=_label(name), kind=kind or "category", values=values))
        if self.reads_pictures:
            columns.append(Column(name=PICTURE, label="Picture", kind="picture"))
        return columns

    def described(
        self, product: BaseModel, *, picture: Path | None = None, explain: bool = True
    ) -> Described:
        """The product of a request. Raises HTTPException 422 where its fields contradict each other or say nothing."""
        fields = {}
        for name, value in product.model_dump(by_alias=True, exclude_none=True).items():
            written = value if isinstance(value, str) else str(value).replace(".", self.mapping.decimal)
            if written.strip():
                fields[name] = written
        text = self._text(fields)
        if not text and (picture is None or not self.reads_pictures):
            raise HTTPException(422, NOTHING_SAID)
        facts = {name: fields[name] for name in self.mapping.features if name in fields}
        warnings = self._unknown_facts(facts)
        if picture is not None and not self.reads_pictures:
            warnings.append("This model does not look at pictures.")
        return Described(text, facts, picture, explain, tuple(warnings))

    def _text(self, fields: dict[str, str]) -> str:
        """The text in the form that the training texts have."""
        parts = [name for name in (*self.text_columns, *self.standard) if name in fields and name != "text"]
        if "text" in fields and "text" in self.standard:
            if parts:
                raise HTTPException(422, f"text: it is the whole text; leave out {parts[0]}, or text")
            return fields["text"]
        name_column = self.text_columns[0] if self.text_columns else "title"
        if "title" in self.standard and "title" in fields and name_column != "title":
            if name_column in fields:
                raise HTTPException(422, f"title: {name_column} is the title; leave one of them out")
            fields = {**fields, name_column: fields["title"]}

        lines = []
        if name_column in fields:
            # a single column was read without labels in training
            label = "" if len(self.text_columns) == 1 else "Item Name: "
            lines.append(label + fields[name_column])
        for column in self.text_columns[1:]:
            if column in fields:
                lines.append(f"{column}: {fields[column]}")
        standard = {name: fields[name] for name in self.standard if name in fields}
        points = [point for point in standard.get("bullets", "").splitlines() if point.strip()]
        for number, point in enumerate(points, 1):
            lines.append(f"Bullet Point {number}: {point.strip()}")
        labels = {"description": "Product Description", "value": "Value", "unit": "Unit"}
        for name, label in labels.items():
            if name in standard:
                lines.append(f"{label}: {standard[name]}")
        return "\n".join(lines)

    def _unknown_facts(self, facts: dict[str, str]) -> list[str]:
        """A sentence for each fact that the model can make nothing of."""
        warnings = []
        for name, written in facts.items():
            if self.mapping.features[name] == "number":
                number = parse_price(written, self.mapping.decimal)
                if number != number:
                    warnings.append(f"{name} is not a number, so the price does without it.")
            elif (known := self.categories.get(name)) and written.strip() not in known:
                warnings.append(f"The model has not seen this {name} before, so the price does without it.")
        return warnings


def _label(name: str) -> str:
    """weight_kg as "Weight kg"."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]
