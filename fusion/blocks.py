"""The parts every fusion model is built from: embedding branch, attention block, mixture of experts.

Legend: B batch, T tokens, D fused width, D_in encoder width, H heads, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts.errors import InputError


class FusionOutput(NamedTuple):
    """What every price model returns."""

    log_price: Tensor
    """(B,) predicted log1p(price)."""
    gate: Tensor | None = None
    """(B, E) share of each expert, None where the model has no mixture."""
    under_15_logit: Tensor | None = None
    """(B,) logit of "costs under $15", None without the auxiliary task."""


def zero_missing(x: Tensor, valid: Tensor | None) -> Tensor:
    """Zero the rows of `x` (B, D) where `valid` (B,) bool is False; None means that all rows are there.

    Selects instead of multiplying: 0 * NaN is NaN, in the output and in the gradient.
    """
    return x if valid is None else torch.where(valid.unsqueeze(-1), x, 0.0)


class Dropout(nn.Dropout):
    """nn.Dropout whose CPU mask is drawn eight elements at a time, from eight of 64 random bits each.

    torch draws a CPU mask one element after the other, on one thread: a tenth of the training step. A chance that is
    no multiple of 1/256 takes sixteen bits and is rounded to 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        bits = 8 if (self.p * 2**8).is_integer() else 16
        words = torch.empty(-(-x.numel() * bits // 64), dtype=torch.int64).random_(-(2**63), None)
        drawn = words.view(torch.int8 if bits == 8 else torch.int16)[: x.numel()].view(x.shape)
        kept = drawn >= round(self.p * 2**bits) - 2 ** (bits - 1)
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


class EmbeddingBranch(nn.Module):
    """Bring one encoder's embedding to the fused width: scale × Linear → LayerNorm → GELU → dropout.

    The learnable scale multiplies the embedding, before the bias is added; behind the bias the LayerNorm
    would cancel it. `depth=2` puts a layer of width `hidden` in between (D_in → 768 → D): a known failure,
    kept as an ablation.
    """

    def __init__(self, *, d_in: int, d_out: int, dropout: float, depth: int = 1, hidden: int = 768):
        super().__init__()
        if depth not in (1, 2):
            raise InputError(f"branch depth {depth} is not 1 or 2")
        widths = (d_in, d_out) if depth == 1 else (d_in, hidden, d_out)
        self.scale = nn.Parameter(torch.ones(1))
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.GELU(), Dropout(dropout))
                for a, b in zip(widths, widths[1:], strict=False)
            )
        )

    def forward(self, embedding: Tensor, valid: Tensor | None = None) -> Tensor:
        """embedding (B, D_in), valid (B,) bool or None → (B, D), zero where the embedding is missing."""
        (linear, *rest), *deeper = self.layers
        # scaled behind the product: before it, the scale's gradient would cost another product with the weights
        x = F.linear(zero_missing(embedding, valid), linear.weight)  # (B, D)
        x = torch.addcmul(linear.bias, self.scale, x)
        for layer in (*rest, *deeper):
            x = layer(x)
        # a branch of zeros is not zero: its biases remain; finite, so a product will do, five times as fast
        return x if valid is None else x * valid.unsqueeze(-1)


class AttentionBlock(nn.Module):
    """Multi-head cross-attention, residual, LayerNorm: LayerNorm(q + W_o Attention(q, kv)).

    With a single key the softmax is 1 and the block is exactly LayerNorm(q + W_o W_v kv): the query and key
    projections receive no gradient and nothing is weighted per product. `short_path` then computes just
    that, from the same parameters; without it the full attention runs, to the same result. The unused
    projections stay in the state dict, so both forms load each other's checkpoints. Their gradient is None
    in the short form (DDP needs find_unused_parameters) and rounding noise in the full one, which Adam
    scales up to steps of full size: weights that wander without any effect.

    Dropout acts on what attention adds, not on its weights: on a single weight of 1 it would switch off
    whole heads, and the two forms would differ.

    Attention as in Vaswani et al. 2017, "Attention is all you need", equation 1, post-norm.
    """

    def __init__(self, *, width: int, heads: int, dropout: float = 0.0, short_path: bool = True):
        super().__init__()
        if heads < 1 or width % heads:
            raise InputError(f"heads={heads} does not divide the width {width}: change one of the two")
        self.heads = heads
        self.short_path = short_path
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, query: Tensor, key_value: Tensor, key_valid: Tensor | None = None) -> Tensor:
        """Let `query` attend to `key_value`.

        Args:
            query: (B, D) or (B, T, D).
            key_value: (B, D) or (B, T_kv, D); values of missing keys are never looked at, NaN included.
            key_valid: bool, (B,) for all keys of a row or (B, T_kv); None means that all are there.

        Returns:
            The shape of `query`. A row without any key gets LayerNorm(query).
        """
        q = query if query.dim() == 3 else query.unsqueeze(1)  # (B, T, D)
        kv = key_value if key_value.dim() == 3 else key_value.unsqueeze(1)  # (B, T_kv, D)
        if key_valid is not None:
            if key_valid.dim() == 1:
                key_valid = key_valid.unsqueeze(1)
            key_valid = key_valid.expand(kv.shape[:2])  # (B, T_kv)
            kv = zero_missing(kv, key_valid)
        if self.short_path and kv.shape[1] == 1:
            attended = self.out(self.value(kv)).expand_as(q)
        else:
            attended = self.out(self._attend(q, kv, key_valid))
        attended = self.dropout(attended)  # (B, T, D)
        if key_valid is not None:
            attended = attended * key_valid.any(dim=1)[:, None, None]
        return self.norm(q + attended).view_as(query)

    def _attend(self, q: Tensor, kv: Tensor, key_valid: Tensor | None) -> Tensor:
        def split_heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D/H)

        mask = None
        if key_valid is not None:
            # A row with no key left would be a softmax over nothing: NaN. It looks at zeros instead.
            mask = (key_valid | ~key_valid.any(dim=1, keepdim=True))[:, None, None, :]  # (B, 1, 1, T_kv)
        q, k, v = split_heads(self.query(q)), split_heads(self.key(kv)), split_heads(self.value(kv))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class ProductPerExpert(torch.autograd.Function):
    """torch.baddbmm(bias, h, weight), one product an expert.

    A batched product deals its matrices to the cores: three experts take two cores as long as four would. The
    gradient is written into the stacked weight's; indexing the weight would add up a full-sized one an expert.
    """

    @staticmethod
    def forward(ctx, bias: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        """bias (E, 1, D_out), h (E, B, D), weight (E, D, D_out) → (E, B, D_out)."""
        ctx.save_for_backward(h, weight)
        out = h.new_empty(*h.shape[:2], weight.shape[2])
        for expert in range(len(weight)):
            torch.addmm(bias[expert], h[expert], weight[expert], out=out[expert])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        grad_h, grad_weight = torch.empty_like(h), torch.empty_like(weight)  # in the strides of both
        for expert in range(len(weight)):
            torch.mm(grad[expert], weight[expert].T, out=grad_h[expert])
            torch.mm(h[expert].T, grad[expert], out=grad_weight[expert])
        return grad.sum(dim=1, keepdim=True), grad_h, grad_weight


def expert_products(bias: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """A layer of all experts: on a GPU and for a few rows one batched product, a third of the products to launch."""
    if h.device.type == "cpu" and h.shape[1] >= 64 and not torch.is_autocast_enabled("cpu"):
        return ProductPerExpert.apply(bias, h, weight)
    return torch.baddbmm(bias, h, weight)


class MixtureOfExperts(nn.Module):
    """Dense mixture: every expert sees every row, gate = softmax(Linear(x)) weighs their outputs.

    An expert is Linear → GELU → dropout for each hidden width, then Linear to `d_out`. All experts read the same x,
    so their first layers are one Linear; the weights of the layers above are stacked.

    Jacobs et al. 1991, "Adaptive mixtures of local experts"; without sparsity or a balancing loss.
    """

    def __init__(
        self,
        *,
        d_in: int,
        hidden: tuple[int, ...] = (1024, 512, 256),
        experts: int = 3,
        dropout: float,
        d_out: int = 1,
    ):
        super().__init__()
        if experts < 1:
            raise InputError(f"experts={experts}: a mixture needs at least one")
        layers = list(zip(hidden, (*hidden[1:], d_out), strict=True))
        self.gate = nn.Linear(d_in, experts)
        self.first = nn.Linear(d_in, experts * hidden[0])
        self.weights = nn.ParameterList(torch.empty(experts, a, b) for a, b in layers)
        self.biases = nn.ParameterList(torch.empty(experts, 1, b) for _, b in layers)
        self.dropout = Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as nn.Linear does: uniform within ±1/√fan_in."""
        self.gate.reset_parameters()
        self.first.reset_parameters()
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def set_output_bias(self, value: float) -> None:
        """Start every expert, and so the mixture, near `value`."""
        nn.init.constant_(self.biases[-1], value)

    def expert(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """Weight (D_out, D_in) and bias (D_out,) of each layer of one expert, as nn.Linear keeps them."""
        weight, bias = (
            parameter.chunk(self.gate.out_features)[number] for parameter in self.first.parameters()
        )
        above = ((w[number].T, b[number, 0]) for w, b in zip(self.weights, self.biases, strict=True))
        return [(weight, bias), *above]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D) → mixed output (B, d_out), gate (B, E) whose rows sum to 1."""
        gate = self.gate(x).softmax(dim=-1)  # (B, E)
        h = self.dropout(F.gelu(self.first(x)))  # (B, E·D_hidden)
        h = h.unflatten(1, (gate.shape[1], -1)).transpose(0, 1)  # (E, B, D_hidden)
        *hidden, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            h = self.dropout(F.gelu(expert_products(bias, h, weight)))
        outputs = expert_products(last_bias, h, last_weight)  # (E, B, d_out)
        return torch.einsum("be,ebo->bo", gate, outputs), gate
