"""SIGTERM says that a machine is about to be taken away: a training writes a checkpoint and ends with exit code 143.

Outside a training loop the signal has its usual effect, which is the same exit code at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import distributed
from tqdm import tqdm

from training.processes import process

EXIT_TERMINATED = 143
"""128 + SIGTERM"""


class StopRequest:
    """Whether this training has been asked to stop; call it once per step, on all processes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.received = False

    def __call__(self) -> bool:
        """The same on all processes, which then stop after the same step: one alone would wait for the others."""
        if process()[1] == 1:
            return self.received
        received = torch.tensor(float(self.received), device=self.device)
        distributed.all_reduce(received, distributed.ReduceOp.MAX)
        return bool(received.item())

    def leave(self, *, saved: bool = True) -> NoReturn:
        """End the program, after the checkpoint was written."""
        if process()[0] == 0:
            where = (
                "a checkpoint was saved, --resume continues from it" if saved else "no checkpoint was saved"
            )
            tqdm.write(f"stopped by SIGTERM; {where}", file=sys.stderr)  # not into the line of a progress bar
        raise SystemExit(EXIT_TERMINATED)


@contextmanager
def stop_on_sigterm(device: torch.device) -> Iterator[StopRequest]:
    """Inside the block SIGTERM is noted instead of obeyed; a second one ends the program at once."""
    request = StopRequest(device)

    def note(signal_number: int, frame: object) -> None:
        request.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    earlier = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, earlier)
