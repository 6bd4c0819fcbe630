"""Every setting of the services with its default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import InputError

MEBIBYTE = 1 << 20


@dataclass
class ServiceSettings:
    """Settings of every service of this repository: where it listens, and what it refuses."""

    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 offers the service to the network; name the hosts that it is reached by, too."""
    port: int = 8000
    """Port to listen on."""
    hosts: tuple[str, ...] = ()
    """Further host names that requests may ask for, besides localhost and --host, such as prices.example.org."""
    origins: tuple[str, ...] = ()
    """Origins whose pages may read the answers (CORS), such as https://shop.example.org."""
    max_body_bytes: int = 8 * MEBIBYTE
    """Largest request body."""
    max_bytes_at_once: int = 256 * MEBIBYTE
    """Most bytes of all request bodies together that are being answered."""
    max_text_characters: int = 20_000
    """Longest text of a field."""
    max_connections: int = 2000
    """Most connections at once; a further one is closed."""
    head_seconds: float = 10.0
    """Seconds in which the head of a request has to arrive."""
    body_seconds: float = 30.0
    """Seconds in which a request body has to arrive, and one more for each 64 KiB of it."""
    answer_seconds: float = 30.0
    """Seconds that a client may take to read what stands in the send buffer."""
    queue: int = 256
    """Most products that wait for the model; a further one is answered 503."""
    batch: int = 32
    """Most products that the model takes at once."""
    wait_ms: float = 5.0
    """Milliseconds that a first product waits for others to join it."""
    threads: int = 0
    """CPU threads of the model; 0 leaves the choice to torch."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>."""

    def __post_init__(self) -> None:
        require_at_least_one(
            self,
            "max_body_bytes",
            "max_bytes_at_once",
            "max_text_characters",
            "max_connections",
            "queue",
            "batch",
        )
        for name in ("head_seconds", "body_seconds", "answer_seconds"):
            if not 0 < getattr(self, name) < math.inf:  # this way round, NaN is refused too
                raise refused(self, name, "must be a number above 0")
        if not 0 <= self.wait_ms <= 1000:
            raise refused(self, "wait_ms", "must be 0 to 1000")
        if not 0 <= self.port <= 65_535:
            raise refused(self, "port", "must be 0 to 65535")


@dataclass
class PriceServiceSettings(ServiceSettings):
    """Settings of serving.api. A token is no setting, since command lines can be seen: it comes from PRICE_TOKEN."""

    model: str = "."
    """Workspace, exported folder or hub id of the saved system."""
    index: Path | None = None
    """Folder of an index of product_matching, which adds /v1/match and /v1/matches."""
    index_model: str = ""
    """Encoder of the index; empty: the one that the index names."""
    jobs: Path | None = None
    """Folder of the uploaded catalogues and their prices; by default jobs/ in the folder of the model."""
    max_products: int = 256
    """Most products per call of /v1/prices."""
    max_titles: int = 64
    """Most titles per call of /v1/matches."""
    max_k: int = 100
    """Most records per title."""
    max_job_bytes: int = 1024 * MEBIBYTE
    """Largest catalogue that can be uploaded."""
    max_jobs: int = 16
    """Most catalogues that wait or are being priced."""
    job_days: float = 7.0
    """Days that a finished job is kept."""
    worker_threads: int = 1
    """CPU threads of the process that prices catalogues."""
    picture_urls: bool = False
    """Fetch pictures from the address in picture_url. Only public addresses are asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(
            self, "max_products", "max_titles", "max_k", "max_job_bytes", "max_jobs", "worker_threads"
        )
        if not self.job_days > 0:
            raise refused(self, "job_days", "must be above 0")


def require_at_least_one(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise refused(settings, name, "must be at least 1")


def refused(settings: Any, name: str, rule: str) -> InputError:
    flag = name.replace("_", "-")
    return InputError(f"--{flag} {getattr(settings, name)}: {rule}")
