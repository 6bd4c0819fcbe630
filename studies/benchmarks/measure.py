"""How every benchmark measures: rivals take turns in one process, beside the limits of the machine.

Rounds are interleaved, so a machine that slows down slows all rivals down. The best time is what the code can do, the
median is what a user sees, and every ratio is one of medians.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from contracts.files import write_json

Name = TypeVar("Name", bound=Hashable)


def interleave(
    rivals: Mapping[Name, Callable[[], object]], *, rounds: int = 5, warmup: int = 1
) -> dict[Name, dict[str, float]]:
    """Run every rival once per round, in turns.

    Args:
        rounds: timed rounds.
        warmup: rounds before them that are not timed.

    Returns:
        For each rival the seconds per call as {"best", "median"}.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in rivals}
    for number in range(warmup + rounds):
        for name, work in rivals.items():
            elapsed = seconds_of(work)
            if number >= warmup:
                seconds[name].append(elapsed)
    return {name: {"best": min(of), "median": statistics.median(of)} for name, of in seconds.items()}


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call. On CUDA, what was queued before it is finished first, and what it queues is included."""
    _synchronise()
    started = time.perf_counter()
    work()
    _synchronise()
    return time.perf_counter() - started


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gemm_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large square matrix product on this machine: the limit of everything that is built from products."""
    size = 8192 if device == "cuda" else 1024
    repeats = 20
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)

    def products() -> None:
        for _ in range(repeats):
            a @ b

    times = interleave({"gemm": products}, rounds=5, warmup=2)
    flop = 2 * size**3 * repeats
    return flop / times["gemm"]["best"]


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes/s, read plus written, of a copy of 256 MiB (1 GiB on CUDA)."""
    numbers = 2**28 if device == "cuda" else 2**26
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, rounds=7, warmup=2)
    return 2 * source.nbytes / times["copy"]["best"]


def machine(device: str = "cpu") -> dict[str, object]:
    """What was measured on: hardware, versions, threads, and the machine's limits as measured in this run."""
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return {
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} × {_processor()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "waiting_threads": os.environ.get("OMP_WAIT_POLICY", "as OpenMP comes").lower(),
        "gemm_flops": gemm_rate(device, dtype),
        "gemm_dtype": str(dtype).removeprefix("torch."),
        "bandwidth_bytes": copy_bandwidth(device),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def report(out: Path, rows: Sequence[Mapping[str, object]], device: str = "cpu", **facts: object) -> None:
    """Print the rows of a benchmark and write them as json, with the command, the machine and other `facts`."""
    content = {"command": _command(), "machine": machine(device), **facts, "rows": rows}
    write_json(out, content)
    for row in rows:
        print(in_one_line(row))
    print(out)


def _command() -> str:
    module = f"studies.benchmarks.{Path(sys.argv[0]).stem}"
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def in_one_line(row: Mapping[str, object]) -> str:
    """A row for people: names and values, numbers with four digits."""
    parts = []
    for name, value in row.items():
        written = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name} {written}")
    return "  ".join(parts)
