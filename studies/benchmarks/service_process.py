"""A service of this repository as a process of its own on a free loopback port."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from contracts.errors import InputError

HOST = "127.0.0.1"
START_SECONDS = 180
"""How long a service may take to load its models."""
STOP_SECONDS = 40


@dataclass(frozen=True)
class Service:
    """A service that answers."""

    port: int
    pid: int

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"


@contextmanager
def running(
    module: str, flags: Sequence[str], *, ready: str = "/ready", environment: Mapping[str, str] | None = None
) -> Iterator[Service]:
    """Run `python -m module flags --port <free port>` until the block ends.

    Args:
        ready: path that answers 200 once the models are loaded.
        environment: variables beside those of this process.

    Raises:
        InputError: the service ended, or did not become ready in START_SECONDS.
    """
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *flags, "--port", str(port)],
        env={**os.environ, **(environment or {})},
    )
    try:
        _wait(process, port, ready)
        yield Service(port, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _wait(process: subprocess.Popen, port: int, ready: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise InputError(f"the service ended with code {process.returncode}; its message stands above")
        if _status(port, ready) == 200:
            return
        time.sleep(0.2)
    raise InputError(f"the service was not ready within {START_SECONDS} s")


def _status(port: int, path: str) -> int | None:
    """Status of a GET request; None where nobody listens yet."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()
