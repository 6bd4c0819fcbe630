"""Load test of the matching service over loopback: p95 latency and requests a second.

    python -m studies.benchmarks.product_matching_load --model FOLDER --pairs ../shared/data/matching/walmart_amazon \\
        --out studies/results/product_matching_load.json

Starts `product_matching.api` as its own process on 127.0.0.1, sends real left-hand titles from 1 and from 8
clients, and stops it again. The number of requests and the time are both bounded.
"""

from __future__ import annotations

import json
import os
import platform
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
from contracts.files import write_json
from training.settings import parse_settings


@dataclass
class LoadSettings:
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """encoder: hub id or local folder"""
    pairs: str = "catalogues"
    """folder with labelled pairs: the right records are indexed, the left titles asked"""
    requests: int = 400
    """most requests a setting"""
    seconds: float = 30.0
    """most time a setting"""
    out: str = "studies/results/product_matching_load.json"
    """json file to write"""


@contextmanager
def service(index: Path) -> Iterator[int]:
    """Run the service on a free loopback port; yields the port when /health answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "product_matching.api",
        "--index",
        str(index),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(command)
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise InputError(f"the service ended with code {process.returncode}")
            try:
                ask(port, "GET", "/health")
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise InputError("the service did not answer within 120 s")
        yield port
    finally:
        process.terminate()
        process.wait(timeout=20)


def ask(
    port: int, method: str, path: str, content: object = None, connection: HTTPConnection | None = None
) -> dict:
    connection = connection or HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, json.dumps(content) if content else None)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    if answer.status != 200:
        raise InputError(f"{path} answered {answer.status}: {body}")
    return body


def load(port: int, titles: list[str], clients: int, requests: int, seconds: float) -> dict[str, float]:
    """Each client keeps one connection and sends its next title when the last one was answered."""
    latency: list[float] = []
    started, turn, lock = time.perf_counter(), iter(range(requests)), threading.Lock()

    def client() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        while time.perf_counter() - started < seconds:
            with lock:
                number = next(turn, None)
            if number is None:
                break
            begin = time.perf_counter()
            ask(port, "POST", "/match", {"title": titles[number % len(titles)], "k": 5}, connection)
            latency.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    p50, p95 = (float(value) for value in np.quantile(latency, [0.5, 0.95]))
    return {"clients": clients, "requests": len(latency), "requests_per_second": round(len(latency) / elapsed, 1),
            "p50_ms": round(1000 * p50, 1), "p95_ms": round(1000 * p95, 1)}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(LoadSettings, argv, description="Load-test the matching service on loopback.")
    from product_matching import index
    from product_matching.pairs import read_pairs, write_pairs

    pairs = read_pairs(settings.pairs)
    titles = pairs.left["title"].tolist()
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(folder, pairs)
        catalogue, place = str(Path(folder) / "right.csv"), Path(folder) / "index"
        built = index.main(
            ["build", "--catalogue", catalogue, "--model", settings.model, "--index", str(place)]
        )
        with service(place) as port:
            load(port, titles, 2, 20, 10)  # warm up
            results = [load(port, titles, clients, settings.requests, settings.seconds) for clients in (1, 8)]
    for row in results:
        print(row)
    write_json(settings.out, {
        "command": "python -m studies.benchmarks.product_matching_load", "catalogue_rows": built.meta["rows"],
        "index": built.meta["kind"], "cores": os.cpu_count(), "machine": platform.machine(),
        "load_average": os.getloadavg()[0], "results": results,
    })  # fmt: skip


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
