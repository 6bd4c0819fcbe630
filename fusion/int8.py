"""A price model with int8 weights, for pricing single rows on a CPU.

To price one row takes as long as to read the weights, and int8 weights have a quarter of the bytes. Weights
are quantised once and activations as they come (torch's dynamic quantisation), so no calibration data is
needed. The output layers stay in float32. All rows of a batch share one scale of the activations, so that a
price would depend a little on its neighbours: price row by row.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.blocks import EmbeddingBranch, MixtureOfExperts, OutputLinear, zero_missing


class FoldedBranch(nn.Module):
    """An EmbeddingBranch whose scale has become part of its first Linear, for prediction only."""

    def __init__(self, branch: EmbeddingBranch):
        super().__init__()
        self.layers = branch.layers
        first: Any = self.layers[0]
        first[0].weight.mul_(branch.scale)

    def forward(self, embedding: Tensor, valid: Tensor | None = None) -> Tensor:
        return zero_missing(self.layers(zero_missing(embedding, valid)), valid)


class LinearExperts(nn.Module):
    """A copy of a MixtureOfExperts with one Linear per expert and layer."""

    def __init__(self, mixture: MixtureOfExperts):
        super().__init__()
        self.gate = mixture.gate
        self.dropout = nn.Dropout(mixture.dropout.p)
        self.experts = nn.ModuleList()
        for number in range(mixture.gate.out_features):
            *hidden, last = mixture.expert(number)
            layers = [_copied(nn.Linear, *layer) for layer in hidden]
            self.experts.append(nn.ModuleList([*layers, _copied(OutputLinear, *last)]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D) → mixed output (B, d_out), gate (B, E)."""
        gate = self.gate(x).softmax(dim=-1)
        outputs = []
        expert: Any
        for expert in self.experts:
            *hidden, last = expert
            h = x
            for linear in hidden:
                h = self.dropout(F.gelu(linear(h)))
            outputs.append(last(h))
        with torch.autocast(x.device.type, enabled=False):
            return torch.einsum("be,ebo->bo", gate, torch.stack(outputs)), gate


def _copied(layer_class: type[nn.Linear], weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer with a copy of weight (D_out, D_in) and bias (D_out,)."""
    linear = layer_class(weight.shape[1], weight.shape[0])
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
        # torch announces that torch.ao gives way to another package, torchao; the pinned torch still has it
        warnings.filterwarnings("ignore", message=".*deprecated")
        # only nn.Linear itself is replaced, not its subclass OutputLinear
        return quantize_dynamic(plain_linears(model), {nn.Linear}, dtype=torch.qint8, inplace=True)
