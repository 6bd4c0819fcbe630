"""What the service counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
ELSEWHERE = "none"
"""Label of requests for no path of ours: paths that strangers invent would make a series each."""


class Metrics:
    """The figures of one service; each service has a registry of its own, so that tests can make several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "http_requests_total", "answered requests", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "http_request_seconds", "from head to answer", ("path",), buckets=SECONDS, registry=self.registry
        )
        self.waiting = Gauge(
            "model_queue_items", "items that wait for the model", ("model",), registry=self.registry
        )
        self.batches = Histogram(
            "model_batch_items",
            "items that the model took at once",
            ("model",),
            buckets=BATCH_SIZES,
            registry=self.registry,
        )
        self.jobs = Gauge("jobs", "jobs by state", ("state",), registry=self.registry)


class Measured:
    """ASGI middleware that counts answers and their time."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # the router has put its route into the scope, which is the same object for all layers
            path = getattr(scope.get("route"), "path", ELSEWHERE)
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
