"""POST /v1/price and /v1/prices, and what a page has to know of the model."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any, get_args

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.datastructures import FormData, UploadFile

from contracts.catalog import FEATURE
from pricing.explain import Explanation, explain_each
from pricing.model import PriceModel
from pricing.products import described_products
from serving.app import GUARDED, Service, problems
from serving.config import PriceServiceSettings
from serving.form import EXPLAIN, PICTURE, PICTURE_URL, Described, ProductForm
from serving.jobs import required_columns
from serving.limits import MULTIPART, QUOTED, json_body, read_form, read_json, require_text, validated
from serving.pictures import PictureDesk
from serving.schemas import (
    Coverage,
    ExplanationAnswer,
    FieldFactor,
    Interval,
    MemberPrice,
    ModalityShare,
    ModelResponse,
    Neighbour,
    PriceResponse,
    PricesResponse,
    Score,
    WordFactor,
)

EXPLAINED_WORDS = 8
"""Words per product of which the factor is found, from the start of its name. Each costs some milliseconds."""
LARGEST_PRICE = 1e12
WARNINGS = {
    "picture": "Without a usable picture, the price rests on the text alone.",
    "text": "Without a text, the price says little.",
    "amount": 'No amount was understood; a text that says "12 oz" or "pack of 6" has a more certain price.',
}
FAR = (
    "The product resembles none of the known ones much, so the price is less certain than its interval says."
)
REFUSALS = problems(400, 401, 413, 415, 422, 503)


class PriceDesk:
    """Turns products into answers; `answer` runs in the model thread."""

    def __init__(self, model: PriceModel, settings: PriceServiceSettings, pictures: PictureDesk):
        self.model = model
        self.pictures = pictures
        self.form = ProductForm(
            model.mapping,
            known_categories(model),
            reads_pictures=model.reads_pictures,
            picture_urls=settings.picture_urls,
        )

    def warm_up(self) -> None:
        """The first call is slow, and no client should wait for it."""
        self.answer([Described("a product, 12 oz", {})])

    def answer(self, products: Sequence[Described]) -> list[PriceResponse]:
        described = described_products(
            [product.text for product in products],
            [product.facts for product in products],
            [product.picture for product in products],
            self.model.mapping,
        )
        explanations = explain_each(
            self.model,
            described,
            most_words=EXPLAINED_WORDS,
            encode_again=False,
            with_effects=[product.explain for product in products],
        )
        answers = []
        for product, explanation in zip(products, explanations, strict=True):
            answers.append(self._answer_one(product, explanation))
        return answers

    def _answer_one(self, product: Described, explanation: Explanation) -> PriceResponse:
        price = explanation.price
        missing = price["missing"].split(", ") if price["missing"] else []
        warnings = [WARNINGS[word] for word in missing]
        warnings += product.warnings
        known = self.model.known_products
        nearest = explanation.known_products
        if known and (nearest.empty or nearest["similarity"].iloc[0] < known.ordinary_similarity):
            warnings.append(FAR)
        intervals: dict[Coverage, Interval] = {}
        for coverage in get_args(Coverage):
            # models that disagree utterly make an interval without end, for which JSON has no number
            high = min(price[f"high_{coverage}"], LARGEST_PRICE)
            intervals[coverage] = Interval(low=price[f"low_{coverage}"], high=high)
        return PriceResponse(
            price=price["price"],
            currency=self.model.mapping.currency,
            intervals=intervals,
            missing=missing,
            warnings=warnings,
            explanation=_explanation_answer(explanation) if product.explain else None,
            neighbours=[self._neighbour(row) for row in nearest.to_dict("records")],
        )

    def _neighbour(self, row: dict[str, Any]) -> Neighbour:
        return Neighbour(
            id=row["sample_id"],
            title=row["name"],
            price=row["price"],
            similarity=round(float(row["similarity"]), 4),
            picture=self.pictures.path_of(row["sample_id"]),
        )


def _explanation_answer(explanation: Explanation) -> ExplanationAnswer:
    members = []
    for row in explanation.members.itertuples():
        members.append(MemberPrice(name=row.member, weight=row.weight, price=round(row.price, 4)))
    fields, words = [], []
    moved: dict[str, float] = {}
    for row in explanation.effects.itertuples():
        factor = round(row.factor, 4)
        if row.kind == "word":
            words.append(WordFactor(word=row.label, factor=factor))
        elif row.kind == "field":
            fields.append(FieldFactor(name=row.label, factor=factor))
        else:
            moved[row.label] = abs(log(row.factor))
    total = sum(moved.values()) or 1.0
    modalities = [ModalityShare(name=name, share=round(by / total, 4)) for name, by in moved.items()]
    return ExplanationAnswer(modalities=modalities, members=members, fields=fields, words=words)


def known_categories(model: PriceModel) -> dict[str, list[str]]:
    """The values that each category has in the training table, the most frequent first; none where it is not kept."""
    path = model.workspace.path("prepared", split="train")
    if not path.is_file():
        return {}
    table = model.workspace.prepared("train")
    values = {}
    for name, kind in model.mapping.features.items():
        if kind == "category" and FEATURE + name in table:  # an exported system keeps names and prices only
            stated = table[FEATURE + name]
            values[name] = stated[stated != ""].value_counts().index.tolist()
    return values


def price_router(service: Service, desk: PriceDesk, settings: PriceServiceSettings) -> APIRouter:
    router = APIRouter(tags=["prices"])
    batcher = service.batcher("price", desk.answer)
    form = desk.form
    Prices = prices_schema(form, settings)

    @router.post(
        "/v1/price",
        responses=REFUSALS,
        dependencies=GUARDED,
        openapi_extra={
            "requestBody": {"required": True, "content": {MULTIPART: {"schema": form_schema(form)}}}
        },
    )
    async def price(request: Request) -> PriceResponse:
        """Price one product, given as a form. `explain=false` leaves the explanation out and is faster."""
        batcher.require_room()
        # a character has at most four bytes
        sent = await read_form(request, max_part_bytes=4 * settings.max_text_characters)
        fields, upload = split_form(sent)
        require_text(fields.items(), settings.max_text_characters)
        explain = _as_bool(fields.pop(EXPLAIN, "true"))
        address = fields.pop(PICTURE_URL, "")
        product = validated(form.schema, fields)
        async with desk.pictures.received(upload, address) as picture:
            return await batcher.one(form.described(product, picture=picture, explain=explain))

    @router.post(
        "/v1/prices",
        responses=REFUSALS,
        dependencies=GUARDED,
        openapi_extra=json_body(Prices),
    )
    async def prices(request: Request) -> PricesResponse:
        """Price several products. Explanations are left out unless `explain` is true."""
        batcher.require_room()
        asked: Any = await read_json(request, Prices)
        products = []
        for number, product in enumerate(asked.products):
            written = product.model_dump(by_alias=True, exclude_none=True)
            texts = [(f"products.{number}.{name}", str(value)) for name, value in written.items()]
            require_text(texts, settings.max_text_characters)
            try:
                products.append(form.described(product, explain=asked.explain))
            except HTTPException as error:
                raise HTTPException(error.status_code, f"products.{number}.{error.detail}") from None
        return PricesResponse(results=await batcher.several(products))

    @router.get("/v1/model", tags=["prices"])
    async def model() -> ModelResponse:
        """What the page builds its form from. It needs no token."""
        return described_model

    score = {name: desk.model.ensemble.score.get(name) for name in Score.model_fields}
    described_model = ModelResponse(
        name=Path(settings.model).resolve().name if Path(settings.model).is_dir() else settings.model,
        currency=desk.model.mapping.currency,
        columns=form.columns(),
        table_columns=required_columns(desk.model.mapping) + picture_columns(desk.model),
        score=Score(**{name: value for name, value in score.items() if value is not None}),
        reads_pictures=desk.model.reads_pictures,
        token_required=bool(service.token),
        picture_urls=settings.picture_urls,
    )
    return router


def picture_columns(model: PriceModel) -> list[str]:
    """The column with the addresses of the pictures, where the model looks at them."""
    image = model.mapping.image
    return [image] if image and model.reads_pictures else []


def prices_schema(form: ProductForm, settings: PriceServiceSettings) -> type[BaseModel]:
    """The body of /v1/prices."""
    Product: Any = form.schema  # a type that is made at run time, which no type checker knows
    fields: dict[str, Any] = {
        "products": (list[Product], Field(min_length=1, max_length=settings.max_products)),
        "explain": (bool, Field(False, strict=True, description="also explain each price")),
    }
    return create_model("PricesRequest", __config__=ConfigDict(extra="forbid"), **fields)


def form_schema(form: ProductForm) -> dict[str, Any]:
    """The body of /v1/price for OpenAPI: all fields of a form are text, except the picture."""
    properties: dict[str, Any] = {}
    for field in form.schema.model_fields.values():
        properties[str(field.alias)] = {"type": "string", "description": field.description}
    properties[PICTURE] = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, GIF or BMP"}
    if form.picture_urls:
        properties[PICTURE_URL] = {
            "type": "string",
            "description": "public http or https address of the picture",
        }
    properties[EXPLAIN] = {"type": "string", "enum": ["true", "false"], "description": "true unless stated"}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def split_form(sent: FormData) -> tuple[dict[str, str], UploadFile | None]:
    """The fields and the picture. Raises HTTPException 422 for a field that occurs twice or has the wrong kind."""
    fields: dict[str, str] = {}
    upload = None
    for name, value in sent.multi_items():
        shown = name[:QUOTED]
        if isinstance(value, UploadFile):
            if name != PICTURE:
                raise HTTPException(422, f"{shown}: it is a file; only {PICTURE} may be one")
            upload = value if value.size else None  # a form without a chosen file sends an empty one
        elif name == PICTURE and value:
            raise HTTPException(422, f"{PICTURE}: send a file")
        elif name in fields:
            raise HTTPException(422, f"{shown}: it is given twice")
        elif name != PICTURE:
            fields[name] = value
    return fields, upload


def _as_bool(written: str) -> bool:
    if written.lower() in ("true", "1", "on", "yes", ""):
        return True
    if written.lower() in ("false", "0", "off", "no"):
        return False
    raise HTTPException(422, f"{EXPLAIN}: write true or false")
