"""What every service of this repository stands on: limits, errors, headers, figures, health, and documents.

    service = Service("Prices", settings)
    prices = service.batcher("price", answer_prices)
    service.app.include_router(price_router(prices))
    service.run()

A request passes, from outside to inside: figures, security headers, limits, CORS, the token, and its endpoint.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from contracts.errors import InputError
from serving.batching import Batcher, Busy
from serving.config import ServiceSettings
from serving.headers import SecurityHeaders, page_policy
from serving.limits import RequestLimits, sentence_of
from serving.metrics import Measured, Metrics
from serving.schemas import Health, Problem, Ready

TOKEN = "PRICE_TOKEN"
"""Environment variable with the token that clients have to send; without it none is needed."""
RETRY_SECONDS = 2
FAILED = "an error of the service; its log says more"
DOCS = "/docs/assets"

Item = TypeVar("Item")
Answer = TypeVar("Answer")

log = logging.getLogger("serving")
bearer = HTTPBearer(auto_error=False, description=f"the value of {TOKEN}, where the service has one")


class Service:
    """A FastAPI application with its batchers, and how to run it."""

    def __init__(
        self,
        title: str,
        summary: str,
        settings: ServiceSettings,
        *,
        health: Health | None = None,
        largest_bodies: dict[tuple[str, str], int] | None = None,
    ):
        """
        Args:
            health: what GET /health answers, if it is more than "ok".
            largest_bodies: see `RequestLimits`.
        """
        self.settings = settings
        self.health = health or Health(status="ok")
        self.token = os.environ.get(TOKEN, "")
        self.metrics = Metrics()
        self.batchers: list[Batcher] = []
        self.on_start: list[Callable[[], Awaitable[Any]]] = []
        self.on_stop: list[Callable[[], Awaitable[Any]]] = []
        # of all models, since two at work at once would only slow each other down
        self.model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        # FastAPI's own pages of documentation would load scripts from elsewhere
        self.app = FastAPI(
            title=title, summary=summary, version="1", lifespan=self._lifespan, docs_url=None, redoc_url=None
        )
        self.app.state.service = self
        if settings.origins:
            self.app.add_middleware(
                CORSMiddleware,
                allow_origins=settings.origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["Authorization", "Content-Type"],
            )
        # the last one added is the outermost
        self.app.add_middleware(RequestLimits, settings=settings, largest=largest_bodies or {})
        self.app.add_middleware(SecurityHeaders)
        self.app.add_middleware(Measured, metrics=self.metrics)
        _answer_errors(self.app)
        self._add_status_endpoints()
        self._add_documents()

    def batcher(
        self, name: str, answer: Callable[[Sequence[Item]], Sequence[Answer | Exception]]
    ) -> Batcher[Item, Answer]:
        """A queue in front of the model thread, started and stopped with the service; `name` labels its figures."""
        batcher = Batcher(answer, self.settings, self.model_thread)
        batcher.batch_sizes = self.metrics.batches.labels(name).observe
        self.metrics.waiting.labels(name).set_function(batcher.queue.qsize)
        self.batchers.append(batcher)
        return batcher

    def run(self) -> None:
        """Serve until interrupted."""
        import uvicorn

        from serving.deadlines import protocol_with_deadlines

        _allow_many_connections(self.settings.max_connections)
        uvicorn.run(
            self.app,
            host=self.settings.host,
            port=self.settings.port,
            http=protocol_with_deadlines(self.settings),
            ws="none",
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=30,
        )

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, self.model_thread.shutdown)
            for batcher in self.batchers:
                batcher.start()
                stack.push_async_callback(batcher.stop)
            for start in self.on_start:
                await start()
            for stop in self.on_stop:
                stack.push_async_callback(stop)
            yield

    def _add_status_endpoints(self) -> None:
        app = self.app

        @app.get("/health", tags=["status"], response_model=type(self.health))
        async def health() -> Health:
            """The process answers. It does so while the model works, too."""
            return self.health

        @app.get("/ready", tags=["status"], responses={503: {"model": Problem}})
        async def ready() -> Ready:
            """The models are loaded, and there is room in the queue."""
            if any(batcher.queue.full() for batcher in self.batchers):
                raise HTTPException(503, "not ready; try again", {"Retry-After": str(RETRY_SECONDS)})
            return Ready(status="ready")

        @app.get("/metrics", tags=["status"], response_class=Response, responses=_text_answer())
        async def metrics() -> Response:
            """Figures in Prometheus' text format."""
            return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _add_documents(self) -> None:
        """/docs with Swagger UI out of an installed package, so that it works without internet."""
        import fastapi_offline

        assets = Path(fastapi_offline.__file__).parent / "static"
        page = get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=f"{self.app.title}: API",
            swagger_js_url=f"{DOCS}/swagger-ui-bundle.js",
            swagger_css_url=f"{DOCS}/swagger-ui.css",
            swagger_favicon_url=f"{DOCS}/favicon.png",
        )
        html = bytes(page.body).decode()
        # Swagger UI sets styles on elements and loads its script from a file
        policy = page_policy(html).replace("script-src ", "script-src 'self' ")
        policy = policy.replace("style-src 'none'", "style-src 'self' 'unsafe-inline'")

        @self.app.get("/docs", include_in_schema=False)
        async def docs() -> HTMLResponse:
            return HTMLResponse(html, headers={"Content-Security-Policy": policy})

        @self.app.get(DOCS + "/{name}", include_in_schema=False)
        async def asset(name: str) -> FileResponse:
            if name not in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
                raise HTTPException(404, "there is no such file")
            return FileResponse(assets / name, headers={"Cache-Control": "max-age=86400"})


async def require_token(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> None:
    """Dependency of every endpoint that a token guards. Raises HTTPException 401."""
    expected = request.app.state.service.token
    given = credentials.credentials if credentials else ""
    # as bytes, since compare_digest refuses text that is not ASCII; a header is read as latin-1, whatever it is
    if expected and not secrets.compare_digest(given.encode("latin-1"), expected.encode()):
        raise HTTPException(
            401,
            "send the service's token in the header Authorization: Bearer",
            {"WWW-Authenticate": "Bearer"},
        )


GUARDED = [Depends(require_token)]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error statuses of an endpoint, for the OpenAPI document."""
    return {status: {"model": Problem} for status in sorted(statuses)}


def _answer_errors(app: FastAPI) -> None:
    """Every error becomes {"detail": one sentence}."""

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        return JSONResponse({"detail": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": sentence_of(error.errors()[0])}, 422)

    @app.exception_handler(InputError)
    async def bad_input(request: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return JSONResponse({"detail": "too many products are waiting; try again"}, 503, headers)

    @app.exception_handler(OSError)
    async def no_space(request: Request, error: OSError) -> JSONResponse:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            log.error("the operating system refused something", exc_info=error)
            return JSONResponse({"detail": FAILED}, 500)
        log.error("the disk is full: %s", error)
        return JSONResponse(
            {"detail": "the disk of the service is full; try again later"}, 503, {"Retry-After": "60"}
        )

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it, and it is no error of ours

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": FAILED}, 500)


def _text_answer() -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def _allow_many_connections(wanted: int) -> None:
    """Raise the limit of open files, which is often 1,024: each connection is one."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + 256
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
