"""Time and peak memory of a piece of work, read from the kernel. Linux only; it imports nothing heavy."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

RESET_PEAK = "5"  # see /proc/[pid]/clear_refs in proc(5)


def seconds_and_peak(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds that `work` takes, and the bytes by which its peak exceeds what this process held before.

    The peak is the kernel's VmHWM and not getrusage's ru_maxrss: that one starts with what the parent process held.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _status_bytes("VmRSS")
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return seconds, _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    kilobytes = status.split(f"{name}:")[1].split()[0]
    return 1024 * int(kilobytes)
