"""Several processes that train one model; without torchrun there is one.

Stages that train through Accelerate's DDP wrapper do not need these functions. Stages that cannot (their parameters
are unfrozen on the way, or some never receive a gradient) combine their gradients here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

# The default arguments of this module hold whatever group exists when it is first imported, and any optimizer imports
# it. Imported later, it would keep the group beyond its end, and one of the group's threads could abort the exit.
import torch.distributed.nn.functional  # noqa: F401
from torch import distributed, nn


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes where torchrun started more than one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL broadcasts objects from the current device
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def process() -> tuple[int, int]:
    """Number of this process and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def from_first_process(value: Any) -> Any:
    """What `value` is on the first process."""
    if process()[1] == 1:
        return value
    holder = [value]
    distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def reduce_gradients(parameters: Iterable[nn.Parameter], how: Literal["sum", "mean"]) -> None:
    """Replace each gradient by its sum or its mean over the processes, in one all-reduce.

    By hand rather than by DDP, which fixes at its start what is trained, and would search the graph of every step for
    parameters that get no gradient.
    """
    processes = process()[1]
    if processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    if how == "mean":
        flat /= processes
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, reduced in zip(gradients, parts, strict=True):
        gradient.copy_(reduced.view_as(gradient))
