"""The training objective: contrastive image-text loss plus the error of the price, over as many pairs as wanted.

B pairs of this process in one step, D_in width of the joint image-text space, W processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from training.processes import process
from training.smape_loss import smape_terms


class _GatherRows(torch.autograd.Function):
    """Concatenate the (B, D_in) of all processes to (W·B, D_in). A row's gradient goes back to its own process."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)  # every process's loss depends on these rows
        return gradient[distributed.get_rank() * ctx.size :][: ctx.size]


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of each picture against all texts and each text against all pictures.

    CLIP, https://arxiv.org/abs/2103.00020, figure 3. Each of W processes scores its own B rows against the W·B rows
    of all. The mean of this value over the processes is the loss of one large batch, and so are its gradients.

    Args:
        image: (B, D_in), unit length; row i belongs to row i of `text`. B is the same on every process.
        text: (B, D_in), unit length.
        scale: scalar, the factor on the cosine.
    """
    rank, processes = process()
    all_image, all_text = image, text
    if processes > 1:
        all_image = _GatherRows.apply(image)
        all_text = _GatherRows.apply(text)
    first = rank * len(image)
    target = torch.arange(first, first + len(image), device=image.device)
    to_text = F.cross_entropy(scale * image @ all_text.T, target)
    to_image = F.cross_entropy(scale * text @ all_image.T, target)
    return (to_text + to_image) / 2


def price_loss(predicted: Tensor, log_price: Tensor, kind: str) -> Tensor:
    """Mean error of predicted log1p(price), a scalar, from predicted and true values, (B,) each.

    Args:
        kind: huber is Huber with delta 1 on log1p(price); smape is the metric as a fraction, 0 to 2
            (`training.smape_loss`).
    """
    if kind == "huber":
        return F.huber_loss(predicted, log_price)
    return smape_terms(predicted, log_price).mean() / 100


def accumulate_backward(
    encode: Callable[[Any], tuple[Tensor, Tensor]],
    batches: Sequence[Any],
    objective: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Leave in .grad the gradient of `objective` over all micro-batches as if they were one, in the memory of one.

    A contrastive loss is not a sum over micro-batches: adding up their gradients would see only the negatives within
    each of them. GradCache (https://arxiv.org/abs/2101.06983) encodes twice instead. It encodes all micro-batches
    without a graph, takes the gradient with respect to the features, then encodes each micro-batch again and
    backpropagates its part of that gradient. The encoder must be deterministic; CLIP has no dropout.

    Args:
        encode: turns a micro-batch of b pairs into (image, text), (b, D_in) each.
        batches: the micro-batches of this process, B pairs in all.
        objective: turns (image, text) of all pairs, (B, D_in) each, into a scalar.

    Returns:
        The value of the objective, detached.
    """
    if len(batches) == 1:
        loss = objective(*encode(batches[0]))
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        features = [encode(batch) for batch in batches]
    sizes = [len(image) for image, _ in features]
    image = torch.cat([image for image, _ in features]).requires_grad_()
    text = torch.cat([text for _, text in features]).requires_grad_()
    loss = objective(image, text)
    loss.backward()
    gradients = zip(image.grad.split(sizes), text.grad.split(sizes), strict=True)
    for batch, gradient in zip(batches, gradients, strict=True):
        torch.autograd.backward(encode(batch), gradient)
    return loss.detach()
