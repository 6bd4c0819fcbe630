"""Several processes that train one fusion model, each on its share of every batch; without torchrun there is one.

Legend: B batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fusion.blocks import FusionOutput


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
    together = distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)


def from_first_process(value: Any) -> Any:
    """What `value` is on the first process."""
    if process()[1] == 1:
        return value
    holder = [value]
    distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def dealt(work: Callable[[Tensor], Tensor], rows: Tensor, device: torch.device) -> Tensor:
    """work(rows), one number a row, float32 (n,) on the CPU; the processes share the rows."""
    rank, processes = process()
    if processes == 1:
        return work(rows)
    whole, share = torch.zeros(len(rows), device=device), slice(rank, None, processes)
    whole[share] = work(rows[share]).to(device)
    distributed.all_reduce(whole)
    return whole.cpu()


def whole_batch(output: FusionOutput, share: slice, size: int) -> FusionOutput:
    """The outputs for all `size` rows of a batch of which this process computed `share`.

    Only its own rows carry a gradient here, so the gradients of the processes add up to the batch's.
    """

    def gather(own: Tensor | None) -> Tensor | None:
        if own is None:
            return None
        whole = own.new_zeros(size)
        whole[share] = own.detach()
        distributed.all_reduce(whole)
        whole[share] = own
        return whole

    return FusionOutput(gather(output.log_price), None, gather(output.under_15_logit))


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the processes.

    By hand rather than by DDP, which would search every step's graph for the projections that get no gradient.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, summed in zip(gradients, parts, strict=True):
        gradient.copy_(summed.view_as(gradient))
