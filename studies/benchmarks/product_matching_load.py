"""Load test of the matching service over loopback: latency and requests per second.

    python -m studies.benchmarks.product_matching_load --model FOLDER --pairs ../shared/data/matching/walmart_amazon

It starts `product_matching.api` as its own process on 127.0.0.1, sends real left-hand titles from 1 and from 8 clients,
and stops it again. The number of requests and the time are both bounded.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import numpy as np

from contracts.errors import InputError, run_entry_point
from studies.tables import RESULTS
from training.settings import parse_settings

HOST = "127.0.0.1"
CLIENTS = (1, 8)
RECORDS_PER_TITLE = 5
START_SECONDS = 120
"""How long the service may take until it answers."""
STOP_SECONDS = 20
REQUEST_SECONDS = 30
"""How long one answer may take."""


@dataclass
class LoadSettings:
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Encoder: hub id or local folder."""
    pairs: Path = Path("catalogues")
    """Folder with labelled pairs: the right records are indexed, the left titles are asked for."""
    requests: int = 400
    """Most requests for each number of clients."""
    seconds: float = 30.0
    """Most seconds for each number of clients."""
    out: Path = RESULTS / "product_matching_load.json"
    """Json file to write."""


@contextmanager
def service(index: Path) -> Iterator[int]:
    """Run the service on a free loopback port; yields the port once /health answers."""
    port = free_port()
    address = ["--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "product_matching.api", "--index", str(index), *address]
    )
    try:
        wait_until_healthy(process, port)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=STOP_SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def wait_until_healthy(process: subprocess.Popen, port: int) -> None:
    """Raises InputError when the service ends or does not answer in time."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise InputError(f"the service ended with code {process.returncode}")
        try:
            ask(connect(port), "GET", "/health")
            return
        except OSError:
            time.sleep(0.5)
    raise InputError(f"the service did not answer within {START_SECONDS} s")


def connect(port: int) -> HTTPConnection:
    return HTTPConnection(HOST, port, timeout=REQUEST_SECONDS)


def ask(connection: HTTPConnection, method: str, path: str, content: object = None) -> dict:
    """The answer to one request. Raises InputError for any status but 200."""
    connection.request(method, path, json.dumps(content) if content else None)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    if answer.status != 200:
        raise InputError(f"{path} answered {answer.status}: {body}")
    return body


def load(port: int, titles: list[str], clients: int, requests: int, seconds: float) -> dict[str, float]:
    """Figures of one load. Each client keeps one connection and sends its next title when the last was answered."""
    latency: list[float] = []
    turn = iter(range(requests))
    lock = threading.Lock()
    started = time.perf_counter()

    def client() -> None:
        connection = connect(port)
        while time.perf_counter() - started < seconds:
            with lock:
                number = next(turn, None)
            if number is None:
                return
            title = titles[number % len(titles)]
            sent = time.perf_counter()
            ask(connection, "POST", "/match", {"title": title, "k": RECORDS_PER_TITLE})
            latency.append(time.perf_counter() - sent)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    return {
        "clients": clients,
        "requests": len(latency),
        "requests_per_second": round(len(latency) / elapsed, 1),
        "p50_ms": round(1000 * float(np.quantile(latency, 0.5)), 1),
        "p95_ms": round(1000 * float(np.quantile(latency, 0.95)), 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(LoadSettings, argv, description=__doc__.split("\n")[0])
    from product_matching import index
    from product_matching.pairs import read_pairs, write_pairs
    from studies.benchmarks.measure import report

    pairs = read_pairs(settings.pairs)
    titles = pairs.left["title"].tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, pairs)
        catalogue = folder / "right.csv"
        of_index = [
            "--catalogue",
            str(catalogue),
            "--model",
            settings.model,
            "--index",
            str(folder / "index"),
        ]
        built = index.main(["build", *of_index])
        with service(folder / "index") as port:
            load(port, titles, clients=2, requests=20, seconds=10)  # warm-up
            rows = [load(port, titles, clients, settings.requests, settings.seconds) for clients in CLIENTS]
    report(
        settings.out,
        rows,
        catalogue_rows=built.meta["rows"],
        index=built.meta["kind"],
        load_average=os.getloadavg()[0],
    )


if __name__ == "__main__":
    run_entry_point(main)
