"""A price model with int8 weights, for pricing single rows on a CPU.

One row is bound by reading the weights; int8 reads a quarter of the bytes. Weights are quantised once, activations
as they come (torch's dynamic quantisation), so no calibration data is needed. All rows of a batch share one scale
of the activations: a price depends a little on its neighbours, unlike in float.
"""

from __future__ import annotations

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.blocks import EmbeddingBranch, MixtureOfExperts, zero_missing


class FoldedBranch(nn.Module):
    """An EmbeddingBranch whose scale has become part of its first Linear, for prediction only."""

    def __init__(self, branch: EmbeddingBranch):
        super().__init__()
        self.layers = branch.layers
        self.layers[0][0].weight.mul_(branch.scale)

    def forward(self, embedding: Tensor, valid: Tensor | None = None) -> Tensor:
        return zero_missing(self.layers(zero_missing(embedding, valid)), valid)


class LinearExperts(nn.Module):
    """A copy of a MixtureOfExperts with one Linear per expert and layer."""

    def __init__(self, mixture: MixtureOfExperts):
        super().__init__()
        self.gate, self.dropout = mixture.gate, nn.Dropout(mixture.dropout.p)
        self.experts = nn.ModuleList(
            nn.ModuleList(_linear(*layer) for layer in mixture.expert(number))
            for number in range(mixture.gate.out_features)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate(x).softmax(dim=-1)  # (B, E)
        outputs = []
        for *hidden, last in self.experts:
            h = x
            for linear in hidden:
                h = self.dropout(F.gelu(linear(h)))
            outputs.append(last(h))
        return torch.einsum("be,ebo->bo", gate, torch.stack(outputs)), gate


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """weight (D_out, D_in), bias (D_out,)"""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear


@torch.no_grad()
def plain_linears(model: nn.Module) -> nn.Module:
    """A float copy of `model` on the CPU, for prediction, whose every product is an nn.Linear."""
    model = copy.deepcopy(model).cpu().eval()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, EmbeddingBranch):
                setattr(parent, name, FoldedBranch(child))
            elif isinstance(child, MixtureOfExperts):
                setattr(parent, name, LinearExperts(child))
    return model


def int8_copy(model: nn.Module) -> nn.Module:
    """A copy of a price model on the CPU, for prediction, with int8 weights; `model` stays as it is."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        # torch announces the end of torch.ao in favour of another package, torchao; the pinned torch has it
        warnings.filterwarnings("ignore", message=".*deprecated")
        return quantize_dynamic(plain_linears(model), {nn.Linear}, dtype=torch.qint8, inplace=True)
