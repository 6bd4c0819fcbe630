"""POST /v1/match and /v1/matches: the same product in an indexed catalogue.

The index and its encoder belong to `product_matching`; this module only knows what a matcher can do, so that the
service of `product_matching` stands on it, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from fastapi import APIRouter, HTTPException, Request

from contracts.errors import InputError
from serving.app import GUARDED, Service, problems
from serving.limits import QUOTED, json_body, read_json, require_text
from serving.schemas import (
    MatchesRequest,
    MatchesResponse,
    MatchRecord,
    MatchRequest,
    TitleMatches,
)

REFUSALS = problems(400, 401, 413, 415, 422, 503)


class Matcher(Protocol):
    """See `product_matching.search.Matcher`."""

    def match(
        self, titles: list[str], k: int = 5, category: str | None = None
    ) -> Sequence[Sequence[Any]]: ...


@dataclass(frozen=True)
class Query:
    """One title, and which records are wanted."""

    title: str
    k: int
    category: str | None


class MatchDesk:
    """Checks what is asked for, and searches in the model thread.

    Args:
        max_titles, max_k, max_title_characters: limits of one request.
    """

    def __init__(
        self, service: Service, matcher: Matcher, *, max_titles: int, max_k: int, max_title_characters: int
    ):
        self.matcher = matcher
        self.max_titles = max_titles
        self.max_k = max_k
        self.max_title_characters = max_title_characters
        self.batcher = service.batcher("match", self.answer)

    async def matched(
        self, titles: list[str], k: int, category: str | None, *, field: str = "title"
    ) -> list[TitleMatches]:
        """The records for each title. Raises HTTPException 422; `field` names the titles in its sentence."""
        if not 1 <= len(titles) <= self.max_titles:
            raise HTTPException(422, f"{field}: {len(titles)} titles; 1 to {self.max_titles} are allowed")
        if k > self.max_k:
            raise HTTPException(422, f"k: {str(k)[:QUOTED]}; at most {self.max_k} is allowed")
        for number, title in enumerate(titles):
            if not title.strip():
                raise HTTPException(422, f"title {number}: it is empty")
            require_text([(f"title {number}", title)], self.max_title_characters)
        if category is not None:
            require_text([("category", category)], QUOTED)
        return await self.batcher.several([Query(title, k, category) for title in titles])

    def answer(self, queries: Sequence[Query]) -> list[TitleMatches | InputError]:
        """Titles that want the same number of records of the same category are searched together."""
        groups: dict[tuple[int, str | None], list[int]] = {}
        for number, query in enumerate(queries):
            groups.setdefault((query.k, query.category), []).append(number)
        answers: dict[int, TitleMatches | InputError] = {}
        for (k, category), numbers in groups.items():
            titles = [queries[number].title for number in numbers]
            try:
                found = self.matcher.match(titles, k, category)
            except InputError as error:  # a category that is not in the catalogue; the other groups go on
                answers |= dict.fromkeys(numbers, error)
                continue
            for number, matches in zip(numbers, found, strict=True):
                records = [MatchRecord(**asdict(match)) for match in matches]
                answers[number] = TitleMatches(title=queries[number].title, matches=records)
        return [answers[number] for number in range(len(queries))]


def match_router(desk: MatchDesk) -> APIRouter:
    router = APIRouter(tags=["matches"])

    @router.post("/v1/match", responses=REFUSALS, dependencies=GUARDED, openapi_extra=json_body(MatchRequest))
    async def match(request: Request) -> TitleMatches:
        """The records that resemble a title most."""
        desk.batcher.require_room()
        asked = await read_json(request, MatchRequest)
        answers = await desk.matched([asked.title], asked.k, asked.category)
        return answers[0]

    @router.post(
        "/v1/matches", responses=REFUSALS, dependencies=GUARDED, openapi_extra=json_body(MatchesRequest)
    )
    async def matches(request: Request) -> MatchesResponse:
        """The same for several titles."""
        desk.batcher.require_room()
        asked = await read_json(request, MatchesRequest)
        return MatchesResponse(
            results=await desk.matched(asked.titles, asked.k, asked.category, field="titles")
        )

    return router
