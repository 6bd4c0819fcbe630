"""What is checked of every request before anything is done with it: host, size, content type, and that text is text.

A refusal is one sentence that says what to change, and it quotes no more than a few characters of the request.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import ServiceSettings

JSON = "application/json"
MULTIPART, URL_ENCODED = "multipart/form-data", "application/x-www-form-urlencoded"
QUOTED = 60
"""Most characters of a request that a refusal repeats."""

Body = TypeVar("Body", bound=BaseModel)


class RequestLimits:
    """ASGI middleware: refuses requests for another host or from the page of another, and counts the bytes of bodies.

    Args:
        largest: bytes of a body, by (method, path); other requests may have `settings.max_body_bytes`.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings, largest: dict[tuple[str, str], int]):
        self.app = app
        self.settings = settings
        self.largest = largest
        self.hosts = {"localhost", "127.0.0.1", "[::1]", settings.host, *settings.hosts}
        self.held = 0
        """bytes of the bodies that are being answered"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        largest = self.largest.get((scope["method"], scope["path"]), self.settings.max_body_bytes)
        refusal = self._refuse_host(headers) or self._refuse_length(headers, largest)
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            refusal = refusal or self._refuse_origin(headers)
        if refusal:
            status, sentence = refusal
            await JSONResponse({"detail": sentence}, status)(scope, receive, send)
            return
        # uploads are streamed to disk and take no memory
        is_held = largest <= self.settings.max_body_bytes
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            arrived = len(message.get("body", b""))
            size += arrived
            if is_held:
                self.held += arrived
            if size > largest:
                raise HTTPException(413, f"the body is larger than {largest} bytes")
            if self.held > self.settings.max_bytes_at_once:
                raise HTTPException(503, "too many large requests at once; try again", {"Retry-After": "2"})
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            if is_held:
                self.held -= size

    def _refuse_host(self, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        name = _without_port(host)
        if name in self.hosts:
            return None
        return 400, f"host {name[:QUOTED]!r} is not served; start the service with --hosts {name[:QUOTED]}"

    def _refuse_origin(self, headers: Headers) -> tuple[int, str] | None:
        """A browser names the page that makes it send something; a page of strangers may not use this service."""
        origin = headers.get("origin")
        if origin is None or origin in self.settings.origins:
            return None
        host = origin.partition("://")[2]
        if _without_port(host) in self.hosts:
            return None
        return (
            400,
            f"pages of {origin[:QUOTED]!r} may not use this service; start it with --origins {origin[:QUOTED]}",
        )

    @staticmethod
    def _refuse_length(headers: Headers, largest: int) -> tuple[int, str] | None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > largest:
            return 413, f"the body is larger than {largest} bytes"
        return None


def _without_port(host: str) -> str:
    """The name in a Host header; an IPv6 address stands in brackets."""
    return (host if host.endswith("]") else host.rsplit(":", 1)[0]).lower()


async def read_json(request: Request, schema: type[Body]) -> Body:
    """The body as `schema`. Raises HTTPException: 400 for what is no JSON, 415 for what does not say that it is JSON,
    422 for JSON that does not fit."""
    require_content_type(request, JSON)
    return validated(schema, parse_json(await request.body()))


async def read_form(request: Request, *, max_part_bytes: int, max_fields: int = 200) -> FormData:
    """The fields and at most one file of a form. Raises HTTPException 400 or 415."""
    require_content_type(request, MULTIPART, URL_ENCODED)
    return await request.form(max_files=1, max_fields=max_fields, max_part_size=max_part_bytes)


def require_content_type(request: Request, *types: str) -> None:
    stated = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if stated not in types:
        raise HTTPException(415, f"content type {stated[:QUOTED] or 'missing'}: send {' or '.join(types)}")


def parse_json(body: bytes) -> Any:
    """Raises HTTPException 400."""
    try:
        # json would accept NaN and Infinity, which are not JSON
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {str(error)[:QUOTED]}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def json_body(schema: type[BaseModel]) -> dict[str, Any]:
    """For `openapi_extra` of an endpoint that reads its body with `read_json`."""
    content = {JSON: {"schema": _without_references(schema.model_json_schema())}}
    return {"requestBody": {"required": True, "content": content}}


def _without_references(schema: dict[str, Any]) -> dict[str, Any]:
    """pydantic puts nested models beside the schema, where a document of OpenAPI does not look for them."""
    nested = schema.pop("$defs", {})

    def put_in(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return put_in(nested[part["$ref"].rsplit("/", 1)[-1]])
            return {name: put_in(value) for name, value in part.items()}
        if isinstance(part, list):
            return [put_in(item) for item in part]
        return part

    return put_in(schema)


def validated(schema: type[Body], content: Any) -> Body:
    """Raises HTTPException 422 with the first thing that does not fit."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise HTTPException(422, sentence_of(error.errors()[0])) from None


def sentence_of(error: Any) -> str:
    """pydantic's error as one sentence: the place and what is wrong there, without the value."""
    parts = [str(part)[:QUOTED] for part in error["loc"] if not _is_branch(part)]
    return f"{'.'.join(parts[:4]) or 'the body'}: {error['msg'][: 2 * QUOTED]}"


def _is_branch(part: object) -> bool:
    """pydantic names the branch of `str | float` that failed; a caller knows only the field."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or part.endswith("]"))


def require_text(fields: Iterable[tuple[str, str]], most_characters: int) -> None:
    """Raises HTTPException 422 for a text, given with its field's name, that is too long or not text."""
    for name, text in fields:
        if problem := problem_of(text, most_characters):
            raise HTTPException(422, f"{name[:QUOTED]}: {problem}")


def problem_of(text: str, most_characters: int) -> str | None:
    """Why a text cannot be used, or None."""
    if len(text) > most_characters:
        return f"{len(text)} characters; at most {most_characters} are allowed"
    # json admits half of a surrogate pair, which no encoding does
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "it holds half of a surrogate pair, which is not text"
    return None
