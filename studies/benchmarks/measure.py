"""How every benchmark measures: rivals take turns in one process, beside the machine's own limits.

Rounds are interleaved, so that a machine that slows down slows all rivals down. Best is what the code can do, median
what a user sees; a ratio is one of medians.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from contracts.files import write_json

RESULTS = Path(__file__).resolve().parents[1] / "results"


def interleave(
    rivals: dict[str, Callable[[], object]], *, rounds: int = 5, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Run every rival once a round, in turns; seconds a call as {"best", "median"} for each.

    On CUDA the device is synchronised before and after every call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(warmup + rounds):
        for name, work in rivals.items():
            elapsed = seconds_of(work)
            if number >= warmup:
                seconds[name].append(elapsed)
    return {name: {"best": min(all_), "median": statistics.median(all_)} for name, all_ in seconds.items()}


def seconds_of(work: Callable[[], object]) -> float:
    _synchronise()
    started = time.perf_counter()
    work()
    _synchronise()
    return time.perf_counter() - started


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gemm_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large square matrix product on this machine: the limit of everything built from products."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    repeats = 20
    times = interleave({"gemm": lambda: [a @ b for _ in range(repeats)]}, rounds=5, warmup=2)
    return 2 * size**3 * repeats / times["gemm"]["best"]


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes/s read plus written by a copy of 256 MiB (1 GiB on CUDA)."""
    source = torch.ones((2**28 if device == "cuda" else 2**26), device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, rounds=7, warmup=2)
    return 2 * source.nbytes / times["copy"]["best"]


def machine(device: str = "cpu") -> dict[str, object]:
    """What was measured on: hardware, versions, threads, and the limits as measured in this run."""
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
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()


def report(out: str | Path, rows: list[dict[str, object]], device: str = "cpu") -> None:
    """Print the rows of a benchmark and write them as json, with the command and the machine."""
    write_json(
        Path(out),
        {"command": "python -m " + " ".join([_module(), *sys.argv[1:]]), "machine": machine(device), "rows": rows},
    )  # fmt: skip
    for row in rows:
        print("  ".join(f"{key} {_short(value)}" for key, value in row.items()))
    print(out)


def _module() -> str:
    return f"studies.benchmarks.{Path(sys.argv[0]).stem}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
