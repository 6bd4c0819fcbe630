"""Load test of the price service over loopback: latency, requests per second, a rush of clients, and memory.

    python -m studies.benchmarks.price_service_load --model OUT

The server is `serving.api` as a process of its own over OUT, a workspace with `data/prepared_test.csv`. The client is
this process: one asyncio loop that sends the texts of that table through keep-alive connections. A third process asks
/health during the rush, so that a busy client does not make the answers look late. All of them share the machine.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import urlencode

import numpy as np

from contracts.errors import InputError, run_entry_point
from studies.benchmarks.service_process import HOST, Service, running
from studies.tables import RESULTS
from training.settings import parse_settings

CLIENTS = (1, 8, 32)
ANSWER_SECONDS = 60
"""An answer that takes longer counts as hanging."""
BETWEEN_HEALTH_CHECKS = 0.05
RUSH_SECONDS = 20
MEMORY_SAMPLES = 20


@dataclass
class LoadSettings:
    model: Path = Path(".")
    """Workspace of the saved system, with its test table."""
    requests: int = 1000
    """Most requests for each number of clients."""
    seconds: float = 40.0
    """Most seconds for each number of clients."""
    rush: int = 1000
    """Clients that come at once."""
    memory_requests: int = 20_000
    """Requests between the first and the last look at the memory of the service."""
    out: Path = RESULTS / "price_service_load.json"
    """Json file to write."""


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int):
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> tuple[int, float]:
        """Send one request; returns the status, and the seconds of Retry-After or 0.

        Raises:
            OSError: the service closed the connection (`asyncio.IncompleteReadError` where it did so half-way).
        """
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(HOST, self.port)
        assert self.reader
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        await self.reader.readexactly(int(_header(head, "content-length") or 0))
        if _header(head, "connection") == "close":
            self.close()
        status = int(head.split(" ", 2)[1])
        return status, float(_header(head, "retry-after") or 0)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        self.writer = None


def _header(head: str, name: str) -> str | None:
    for line in head.split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    return None


def price_request(text: str, *, explain: bool) -> bytes:
    body = urlencode({"text": text, "explain": str(explain).lower()}).encode()
    head = (
        f"POST /v1/price HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def load(
    port: int, requests: Sequence[bytes], clients: int, count: int, seconds: float
) -> dict[str, float | int]:
    """Figures of one load. Each client sends its next request when the last one was answered.

    Raises:
        InputError: an answer was not 200.
    """
    latency: list[float] = []
    numbers = iter(range(count))
    started = time.perf_counter()

    async def one_client() -> None:
        client = Client(port)
        for number in numbers:
            sent = time.perf_counter()
            if sent - started > seconds:
                break
            status, _ = await asyncio.wait_for(client.ask(requests[number % len(requests)]), ANSWER_SECONDS)
            if status != 200:
                raise InputError(f"the service answered {status} to {clients} clients")
            latency.append(time.perf_counter() - sent)
        client.close()

    await asyncio.gather(*[one_client() for _ in range(clients)])
    elapsed = time.perf_counter() - started
    return {
        "clients": clients,
        "requests": len(latency),
        "requests_per_second": round(len(latency) / elapsed, 1),
        "p50_ms": _milliseconds(latency, 0.5),
        "p95_ms": _milliseconds(latency, 0.95),
    }


async def rush(port: int, requests: Sequence[bytes], clients: int) -> dict[str, object]:
    """All clients ask at the same moment, and ask again for RUSH_SECONDS: at once after a price, and after a 503 when
    Retry-After says."""
    statuses: Counter[int] = Counter()
    latency: list[float] = []
    broken = 0
    hanging = 0
    deadline = time.perf_counter() + RUSH_SECONDS

    async def one_client(number: int) -> None:
        nonlocal broken, hanging
        client = Client(port)
        while time.perf_counter() < deadline:
            sent = time.perf_counter()
            try:
                asked = client.ask(requests[number % len(requests)])
                status, retry_after = await asyncio.wait_for(asked, ANSWER_SECONDS)
            except TimeoutError:
                hanging += 1
                return
            except (OSError, asyncio.IncompleteReadError):
                broken += 1
                client.close()
                continue
            statuses[status] += 1
            latency.append(time.perf_counter() - sent)
            if retry_after:
                await asyncio.sleep(retry_after)
        client.close()

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        await asyncio.get_running_loop().run_in_executor(pool, os.getpid)  # started before the rush
        health = asyncio.get_running_loop().run_in_executor(pool, health_latency, port, RUSH_SECONDS)
        await asyncio.gather(*[one_client(number) for number in range(clients)])
        checks = await health
    return {
        "clients": clients,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "hanging": hanging,
        "broken_connections": broken,
        "slowest_answer_ms": _milliseconds(latency, 1),
        "health_checks": len(checks),
        "health_p50_ms": _milliseconds(checks, 0.5),
        "health_p99_ms": _milliseconds(checks, 0.99),
        "health_slowest_ms": _milliseconds(checks, 1),
    }


def health_latency(port: int, seconds: float) -> list[float]:
    """Seconds that each answer of /health took, one after another."""
    latency = []
    connection = HTTPConnection(HOST, port, timeout=ANSWER_SECONDS)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        sent = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        latency.append(time.perf_counter() - sent)
        time.sleep(BETWEEN_HEALTH_CHECKS)
    connection.close()
    return latency


async def memory(service: Service, requests: Sequence[bytes], count: int) -> dict[str, object]:
    """Resident memory of the service while 32 clients send `count` requests, in equal parts."""
    held = []
    part = max(1, count // MEMORY_SAMPLES)
    for first in range(0, count, part):
        held.append(resident_megabytes(service.pid))
        ordered = [requests[(first + number) % len(requests)] for number in range(part)]
        await load(service.port, ordered, 32, part, float("inf"))
    held.append(resident_megabytes(service.pid))
    half = len(held) // 2
    return {
        "memory_requests": count,
        "resident_mb": held,
        # the first half may still fill caches and pools; what grows in the second half would grow for ever
        "second_half_growth_mb": round(held[-1] - held[half], 1),
    }


def resident_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = int(status.split("VmRSS:")[1].split()[0])
    return round(kilobytes / 1024, 1)


def _milliseconds(seconds: Sequence[float], quantile: float) -> float:
    return round(1000 * float(np.quantile(seconds, quantile)), 1)


def texts_of(model: Path) -> Iterator[str]:
    """Texts of products that the system was not fitted to."""
    from contracts.workspace import Workspace

    for text in Workspace(model).prepared("test")["catalog_content"]:
        if text.strip():
            yield text


async def measure(service: Service, settings: LoadSettings) -> list[dict]:
    texts = list(texts_of(settings.model))
    requests = [price_request(text, explain=False) for text in texts]
    explained = [price_request(text, explain=True) for text in texts]
    port = service.port
    await load(port, requests, clients=8, count=100, seconds=20)  # warm-up
    rows: list[dict] = []
    for clients in CLIENTS:
        figures = await load(port, requests, clients, settings.requests, settings.seconds)
        rows.append({"load": "price", **figures})
    figures = await load(port, explained, 1, settings.requests, settings.seconds)
    rows.append({"load": "price with explanation", **figures})
    rows.append({"load": "rush", **await rush(port, requests, settings.rush)})
    rows.append({"load": "memory", **await memory(service, requests, settings.memory_requests)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(LoadSettings, argv, description=__doc__.split("\n")[0])
    from studies.benchmarks.measure import report

    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as jobs:
        flags = ["--model", str(settings.model), "--jobs", jobs, "--device", "cpu"]
        with running("serving.api", flags) as service:
            rows = asyncio.run(measure(service, settings))
    report(
        settings.out,
        rows,
        server="serving.api, one process, uvicorn",
        client="one asyncio process over loopback on the same machine, keep-alive connections",
        load_average_before=load_average,
    )


if __name__ == "__main__":
    run_entry_point(main)
