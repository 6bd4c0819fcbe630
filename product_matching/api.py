"""The matching service: POST /match and GET /health.

    python -m product_matching.api --index index --port 8000
    curl -s localhost:8000/match -d '{"title": "sony dsc-w120 7.2mp camera", "k": 3}'

A body that is too large answers 413, one that is not JSON 400, one that asks for something impossible 422; the
answer is {"detail": "<one sentence>"}.
"""

from __future__ import annotations

import json
import sys
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


class MatchRequest(BaseModel):
    """What to look for."""

    model_config = ConfigDict(extra="forbid")

    title: StrictStr | list[StrictStr] = Field(description="one title or several")
    k: StrictInt = Field(5, ge=1, description="records a title")
    category: StrictStr | None = Field(None, description="search only this category")

    @property
    def titles(self) -> list[str]:
        return [self.title] if isinstance(self.title, str) else self.title


def read_request(body: bytes, limits: ServeSettings) -> MatchRequest:
    """Parse and check a request body. Raises HTTPException with one sentence that names what to change."""
    try:
        # json accepts NaN and Infinity, which JSON does not have
        content = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {str(error)[:200]}") from None
    try:
        request = MatchRequest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(
            str(part) for part in first["loc"] if part not in ("str", "list[constrained-str]", "list[str]")
        )
        raise HTTPException(422, f"{place or 'the body'}: {first['msg']}") from None
    if not 1 <= len(request.titles) <= limits.max_titles:
        raise HTTPException(422, f"title: {len(request.titles)} titles; 1 to {limits.max_titles} are allowed")
    if request.k > limits.max_k:
        raise HTTPException(422, f"k: {request.k}; at most {limits.max_k} is allowed")
    for number, title in enumerate(request.titles):
        if not title.strip():
            raise HTTPException(422, f"title {number}: it is empty")
        if len(title) > limits.max_title_characters:
            raise HTTPException(
                422,
                f"title {number}: {len(title)} characters; at most {limits.max_title_characters} are allowed",
            )
        if any("\ud800" <= character <= "\udfff" for character in title):
            raise HTTPException(422, f"title {number}: it holds half of a surrogate pair, which is not text")
    return request


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


async def limited_body(request: Request) -> bytes:
    """The body, counted as it comes: a content-length header may lie or be absent."""
    body, most = bytearray(), request.app.state.limits.max_body_bytes
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HTTPException(413, f"the body is larger than {most} bytes")
    return bytes(body)


def create_app(matcher: Matcher, limits: ServeSettings) -> FastAPI:
    """The service over one index."""
    app = FastAPI(title="Product matching", summary="Finds the same product in an indexed catalogue")
    app.state.limits = limits
    one_at_a_time = (
        threading.Lock()
    )  # torch already uses all cores for one request; two at once only slow each other

    schema = {"required": True, "content": {"application/json": {"schema": MatchRequest.model_json_schema()}}}

    @app.post("/match", openapi_extra={"requestBody": schema})
    def match(body: Annotated[bytes, Depends(limited_body)]) -> dict[str, Any]:
        request = read_request(body, limits)
        try:
            with one_at_a_time:
                found = matcher.match(request.titles, request.k, request.category)
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        results = [
            {"title": title, "matches": [asdict(match) for match in matches]}
            for title, matches in zip(request.titles, found, strict=True)
        ]
        return {"results": results}

    @app.get("/health")
    def health() -> dict[str, Any]:
        meta = matcher.index.meta
        return {"status": "ok"} | {
            name: meta[name] for name in ("model", "kind", "rows", "width", "recall_at_10")
        }

    return app


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(ServeSettings, argv, description="Serve POST /match and GET /health.")
    import torch
    import uvicorn

    if settings.threads:
        torch.set_num_threads(settings.threads)
    matcher = Matcher.load(settings.index, settings.model, settings.device)
    matcher.match(["warm up"], 1)
    uvicorn.run(create_app(matcher, settings), host=settings.host, port=settings.port, log_level="warning")


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
