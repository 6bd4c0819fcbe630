"""How several processes share the rows of a fusion model: those of a step, and those to predict.

Without torchrun there is one process, and everything here returns what it was given.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed

from fusion.blocks import FusionOutput
from training.processes import process


def own_share() -> slice:
    """Which rows of any number are this process's: every n-th, counted from its own number."""
    rank, processes = process()
    return slice(rank, None, processes)


def dealt(work: Callable[[Tensor], Tensor], rows: Tensor, device: torch.device) -> Tensor:
    """work(rows) (n,), float32 on the CPU: one number per row, of which each process computes its share."""
    if process()[1] == 1:
        return work(rows)
    share = own_share()
    whole = torch.zeros(len(rows), device=device)
    whole[share] = work(rows[share]).to(device)
    distributed.all_reduce(whole)  # the sum: every number is zero on all processes but one
    return whole.cpu()


def whole_batch(output: FusionOutput, size: int) -> FusionOutput:
    """The outputs for all `size` rows of a batch of which this process computed its own share.

    Only its own rows carry a gradient here, so the gradients of the processes add up to the batch's.
    """
    if process()[1] == 1:
        return output
    log_price = _gathered(output.log_price, size)
    if output.under_15_logit is None:
        return FusionOutput(log_price)
    return FusionOutput(log_price, under_15_logit=_gathered(output.under_15_logit, size))


def _gathered(own: Tensor, size: int) -> Tensor:
    share = own_share()
    whole = own.new_zeros(size)
    whole[share] = own.detach()
    distributed.all_reduce(whole)
    whole[share] = own  # the same numbers again, now with their gradient
    return whole
