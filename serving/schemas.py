"""What the services take and give, as pydantic models: OpenAPI is made from them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr


class Problem(BaseModel):
    """Every error."""

    detail: str = Field(description="one sentence that says what to change")


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    status: Literal["ready"]


Coverage = Literal["80", "95"]


class Interval(BaseModel):
    """Where the true price lies in so many of 100 cases."""

    low: float
    high: float


class ModalityShare(BaseModel):
    """What a model sees of the product, such as its picture by CLIP."""

    name: str
    share: float = Field(
        description="of all that leaving out one modality or another does to the price, 0 to 1"
    )


class MemberPrice(BaseModel):
    """What one model of the ensemble says."""

    name: str
    weight: float
    price: float


class FieldFactor(BaseModel):
    name: str = Field(description='"amount", "picture" or a column of the model')
    factor: float = Field(description="the price divided by the price without this field")


class WordFactor(BaseModel):
    word: str
    factor: float = Field(description="the price divided by the price without this word")


class ExplanationAnswer(BaseModel):
    """Why the product has its price. Factors of several words do not multiply to that of all of them."""

    modalities: list[ModalityShare] = Field(description="only where the model reads several embeddings")
    members: list[MemberPrice]
    fields: list[FieldFactor]
    words: list[WordFactor]


class Neighbour(BaseModel):
    """A known product that resembles the priced one."""

    id: str
    title: str
    price: float
    similarity: float = Field(description="cosine, at most 1")
    picture: str | None = Field(description="path of its picture on this service")


class PriceResponse(BaseModel):
    price: float
    currency: str
    intervals: dict[Coverage, Interval]
    missing: list[Literal["picture", "text", "amount"]] = Field(
        description="what the price had to do without"
    )
    warnings: list[str]
    explanation: ExplanationAnswer | None = Field(description="null where it was not asked for")
    neighbours: list[Neighbour]


class PricesResponse(BaseModel):
    results: list[PriceResponse] = Field(description="in the order of the products")


class Column(BaseModel):
    """A field of the form."""

    name: str
    label: str
    kind: Literal["text", "number", "category", "picture"]
    values: list[str] | None = Field(default=None, description="of a category, the most frequent first")


class Score(BaseModel):
    """How well the model prices products that it has not seen."""

    smape: float | None = Field(default=None, description="mean symmetric percentage error")
    standard_error: float | None = None
    rows: int | None = Field(default=None, description="products behind the score")
    coverage: dict[str, float] = Field(default={}, description="share of true prices inside each interval")


class ModelResponse(BaseModel):
    name: str
    currency: str
    columns: list[Column]
    table_columns: list[str] = Field(description="columns that a table for a job has")
    score: Score
    reads_pictures: bool
    token_required: bool
    picture_urls: bool


class MatchRequest(BaseModel):
    """One title."""

    model_config = ConfigDict(extra="forbid")

    title: StrictStr
    k: StrictInt = Field(5, ge=1, description="records per title")
    category: StrictStr | None = Field(None, description="search only this category")


class MatchesRequest(BaseModel):
    """Several titles."""

    model_config = ConfigDict(extra="forbid")

    titles: list[StrictStr] = Field(min_length=1)
    k: StrictInt = Field(5, ge=1, description="records per title")
    category: StrictStr | None = Field(None, description="search only this category")


class MatchRecord(BaseModel):
    """A record of the index."""

    id: str
    title: str
    brand: str
    model: str
    category: str
    price: str
    cosine: float
    probability: float | None = Field(description="that it is the same product; null without a calibration")
    confidence: str | None


class TitleMatches(BaseModel):
    title: str
    matches: list[MatchRecord]


class MatchesResponse(BaseModel):
    results: list[TitleMatches] = Field(description="in the order of the titles")


class BadRow(BaseModel):
    row: int = Field(description="data row of the uploaded table, from 1")
    id: str
    reason: str


class JobResponse(BaseModel):
    id: str
    state: Literal["queued", "running", "done", "failed"]
    rows: int | None = Field(description="null until they are counted")
    rows_done: int
    bad_rows: list[BadRow] = Field(description="rows without a price; at most the first 100")
    bad_rows_total: int
    seconds_left: float | None
    error: str | None = Field(default=None, description="why the job failed")
