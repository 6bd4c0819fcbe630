"""The matching service: POST /match, and what every service of this repository has (`serving.app`).

    python -m product_matching.api --index index --port 8000
    curl -s localhost:8000/match -d '{"title": "sony dsc-w120 7.2mp camera", "k": 3}'

A bad request is answered with {"detail": "<one sentence>"} and a status: 413 for a body that is too large, 400 for one
that is not JSON, 422 for one that asks for something impossible, 503 while too many titles wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from contracts.errors import run_entry_point
from product_matching.config import ServeSettings
from product_matching.search import Matcher
from serving.app import GUARDED, Service
from serving.limits import json_body, parse_json, validated
from serving.matches import REFUSALS, MatchDesk, match_router
from serving.schemas import Health, MatchesResponse
from training.settings import parse_settings


class TitleRequest(BaseModel):
    """The body of POST /match."""

    model_config = ConfigDict(extra="forbid")

    title: StrictStr | list[StrictStr] = Field(description="one title or several")
    k: StrictInt = Field(5, ge=1, description="records per title")
    category: StrictStr | None = Field(None, description="search only this category")

    @property
    def titles(self) -> list[str]:
        return [self.title] if isinstance(self.title, str) else self.title


class IndexHealth(Health):
    """The answer of GET /health, which also names the index."""

    model: str = Field(description="encoder")
    kind: str
    rows: int
    width: int
    recall_at_10: float


def create_service(matcher: Matcher, settings: ServeSettings) -> Service:
    """The service over one index."""
    meta = matcher.index.meta
    health = IndexHealth(**{name: meta[name] for name in IndexHealth.model_fields if name != "status"})
    service = Service(
        "Product matching", "Finds the same product in an indexed catalogue", settings, health=health
    )
    desk = MatchDesk(
        service,
        matcher,
        max_titles=settings.max_titles,
        max_k=settings.max_k,
        max_title_characters=settings.max_title_characters,
    )
    service.app.include_router(match_router(desk))

    @service.app.post(
        "/match",
        tags=["matches"],
        responses=REFUSALS,
        dependencies=GUARDED,
        openapi_extra=json_body(TitleRequest),
    )
    async def match(request: Request) -> MatchesResponse:
        """One title or several. It does not ask for a content type, so that `curl -d` suffices."""
        asked = validated(TitleRequest, parse_json(await request.body()))
        return MatchesResponse(results=await desk.matched(asked.titles, asked.k, asked.category))

    return service


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(ServeSettings, argv, description="Serve POST /match and GET /health.")
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)
    matcher = Matcher.load(settings.index, settings.model, settings.device)
    matcher.match(["warm up"], 1)  # the first call is slow, and no client should wait for it
    create_service(matcher, settings).run()


if __name__ == "__main__":
    run_entry_point(main)
