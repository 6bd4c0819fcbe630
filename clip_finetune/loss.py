"""What is minimised: contrastive image-text loss plus the error of the price, over as many pairs as wanted.

B: pairs of this process in one step, D: width of the joint space, W: processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

LOWEST_LOG_PRICE = 0.01  # one cent; the logarithm of expm1 needs a positive argument


class _GatherRows(torch.autograd.Function):
    """Concatenate (B, D) of every process to (W·B, D); the gradient goes back to the process that owns the row."""

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

    CLIP, https://arxiv.org/abs/2103.00020, figure 3. With W processes each scores its own B rows against the
    W·B rows of all; the mean over processes of this value, and of its gradients, is that of one large batch.

    Args:
        image: (B, D), unit length; row i belongs to row i of `text`. B is the same on every process.
        text: (B, D), unit length.
        scale: scalar, the factor on the cosine.
    """
    all_image, all_text, first = image, text, 0
    if _processes() > 1:
        all_image, all_text = _GatherRows.apply(image), _GatherRows.apply(text)
        first = distributed.get_rank() * len(image)
    target = torch.arange(first, first + len(image), device=image.device)
    to_text = F.cross_entropy(scale * image @ all_text.T, target)
    to_image = F.cross_entropy(scale * text @ all_image.T, target)
    return (to_text + to_image) / 2


def price_loss(predicted: Tensor, log_price: Tensor, kind: str) -> Tensor:
    """Mean error of predicted log1p prices, both (B,).

    huber: Huber with delta 1 on log1p prices. smape: 2·tanh(|ln p − ln a| / 2), which is exactly
    |p − a| / ((p + a) / 2), the metric without its factor 100.
    """
    if kind == "huber":
        return F.huber_loss(predicted, log_price)
    return (2 * torch.tanh((_log_expm1(predicted) - _log_expm1(log_price)).abs() / 2)).mean()


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _log_expm1(log_price: Tensor) -> Tensor:
    """ln of the price from log1p of the price, without overflow."""
    log_price = log_price.clamp(min=LOWEST_LOG_PRICE)
    return log_price + torch.log(-torch.expm1(-log_price))


def accumulate_backward(
    encode: Callable[[Any], tuple[Tensor, Tensor]],
    batches: Sequence[Any],
    objective: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Leave in .grad the gradient of `objective` over all `batches` as if they were one, in the memory of one.

    A contrastive loss is no sum over batches, so adding up their gradients would only see each batch's own
    negatives. Two passes instead (GradCache, https://arxiv.org/abs/2101.06983): encode all without a graph, take
    the gradient with respect to the features, then encode each batch again and push its part through.
    The encoder must be deterministic; CLIP has no dropout.

    Args:
        encode: batch -> (image, text), each (b, D).
        objective: (image, text) of all batches, each (B, D) -> scalar.

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
    image, text = (torch.cat(part).requires_grad_() for part in zip(*features, strict=True))
    loss = objective(image, text)
    loss.backward()
    gradients = zip(image.grad.split(sizes), text.grad.split(sizes), strict=True)
    for batch, gradient in zip(batches, gradients, strict=True):
        torch.autograd.backward(encode(batch), gradient)
    return loss.detach()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes.

    By hand rather than by DDP, which fixes at its start what is trained and expects one backward pass a step.
    """
    if _processes() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    means = (flat / _processes()).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
