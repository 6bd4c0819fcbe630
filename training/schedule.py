"""The learning rate over a run: a linear warm-up, then a decay to zero."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    step: int, total: int, warmup_ratio: float, decay: Literal["cosine", "linear"] = "cosine"
) -> float:
    """The factor on the peak learning rate for one step.

    Args:
        step: steps taken before this one, 0 to total − 1.
        total: steps of the whole run.
        warmup_ratio: share of all steps over which the rate rises in a line; it takes at least one step.
        decay: how the rate falls after that; both forms reach zero only after the last step.
    """
    warmup = max(1, round(warmup_ratio * total))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if decay == "linear":
        return max(0.0, 1 - done)
    return (1 + math.cos(math.pi * done)) / 2
