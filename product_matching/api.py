"""The matching service: POST /match and GET /health.

    python -m product_matching.api --index index --port 8000
    curl -s localhost:8000/match -d '{"title": "sony dsc-w120 7.2mp camera", "k": 3}'

A bad request is answered with {"detail": "<one sentence>"} and a status: 413 for a body that is too large, 400 for one
that is not JSON, 422 for one that asks for something impossible.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from contracts.errors import InputError, run_entry_point
from product_matching.config import ServeSettings
from product_matching.search import Matcher
from training.settings import parse_settings

TOO_LARGE, NOT_JSON, IMPOSSIBLE = 413, 400, 422
_HEALTH = ("model", "kind", "rows", "width", "recall_at_10")
# pydantic names the branch of `title: str | list[str]` that failed; a caller knows only the field
_BRANCHES = ("str", "list[str]", "list[constrained-str]")


class MatchRequest(BaseModel):
    """The body of POST /match."""

    model_config = ConfigDict(extra="forbid")

    title: StrictStr | list[StrictStr] = Field(description="one title or several")
    k: StrictInt = Field(5, ge=1, description="records per title")
    category: StrictStr | None = Field(None, description="search only this category")

    @property
    def titles(self) -> list[str]:
        return [self.title] if isinstance(self.title, str) else self.title


def read_request(body: bytes, limits: ServeSettings) -> MatchRequest:
    """Parse and check a request body. Raises HTTPException with one sentence that names what to change."""
    content = _parse_json(body)
    try:
        request = MatchRequest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in _BRANCHES)
        raise HTTPException(IMPOSSIBLE, f"{place or 'the body'}: {first['msg']}") from None
    _check_limits(request, limits)
    return request


def _parse_json(body: bytes) -> Any:
    try:
        # json would accept NaN and Infinity, which are not JSON
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise HTTPException(NOT_JSON, f"the body is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(NOT_JSON, f"the body is not JSON: {str(error)[:200]}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _check_limits(request: MatchRequest, limits: ServeSettings) -> None:
    if not 1 <= len(request.titles) <= limits.max_titles:
        raise HTTPException(
            IMPOSSIBLE, f"title: {len(request.titles)} titles; 1 to {limits.max_titles} are allowed"
        )
    if request.k > limits.max_k:
        raise HTTPException(IMPOSSIBLE, f"k: {request.k}; at most {limits.max_k} is allowed")
    for number, title in enumerate(request.titles):
        if problem := _problem_of(title, limits):
            raise HTTPException(IMPOSSIBLE, f"title {number}: {problem}")


def _problem_of(title: str, limits: ServeSettings) -> str | None:
    if not title.strip():
        return "it is empty"
    if len(title) > limits.max_title_characters:
        return f"{len(title)} characters; at most {limits.max_title_characters} are allowed"
    if any("\ud800" <= character <= "\udfff" for character in title):
        return "it holds half of a surrogate pair, which is not text"
    return None


async def limited_body(request: Request) -> bytes:
    """The body, counted while it arrives: a content-length header may be wrong or absent."""
    largest = request.app.state.limits.max_body_bytes
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > largest:
            raise HTTPException(TOO_LARGE, f"the body is larger than {largest} bytes")
    return bytes(body)


def create_app(matcher: Matcher, limits: ServeSettings) -> FastAPI:
    """The service over one index."""
    app = FastAPI(title="Product matching", summary="Finds the same product in an indexed catalogue")
    app.state.limits = limits
    # torch already uses all cores for one request: two at once would only slow each other down
    one_at_a_time = threading.Lock()
    # the body is parsed by `read_request`, so FastAPI cannot derive its schema
    schema = MatchRequest.model_json_schema()
    body_schema = {"required": True, "content": {"application/json": {"schema": schema}}}

    @app.post("/match", openapi_extra={"requestBody": body_schema})
    def match(body: Annotated[bytes, Depends(limited_body)]) -> dict[str, Any]:
        request = read_request(body, limits)
        try:
            with one_at_a_time:
                found = matcher.match(request.titles, request.k, request.category)
        except InputError as error:
            raise HTTPException(IMPOSSIBLE, str(error)) from None
        results = []
        for title, matches in zip(request.titles, found, strict=True):
            results.append({"title": title, "matches": [asdict(match) for match in matches]})
        return {"results": results}

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", **{name: matcher.index.meta[name] for name in _HEALTH}}

    return app


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(ServeSettings, argv, description="Serve POST /match and GET /health.")
    import torch
    import uvicorn

    if settings.threads:
        torch.set_num_threads(settings.threads)
    matcher = Matcher.load(settings.index, settings.model, settings.device)
    matcher.match(["warm up"], 1)  # the first call is slow, and no client should wait for it
    uvicorn.run(create_app(matcher, settings), host=settings.host, port=settings.port, log_level="warning")


if __name__ == "__main__":
    run_entry_point(main)
