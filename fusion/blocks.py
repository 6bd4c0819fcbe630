"""The parts that every fusion model is built from: branch, attention block, mixture of experts, output layer.

Legend: B batch, T tokens, D fused width, D_in encoder width, H heads, E experts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts.errors import InputError


class FusionOutput(NamedTuple):
    """What every price model returns."""

    log_price: Tensor
    """(B,) float32, predicted log1p(price)."""
    gate: Tensor | None = None
    """(B, E) share of each expert, None where the model has no mixture."""
    under_15_logit: Tensor | None = None
    """(B,) float32, logit of "costs under $15", None without the auxiliary task."""


class PriceModel(nn.Module):
    """What the models of both packages have in common."""

    def set_output_bias(self, value: float) -> None:
        """Start the predictions near `value`, the mean over the rows to fit, instead of near zero."""
        raise NotImplementedError

    def forward(self, embeddings: dict[str, Tensor], valid: Tensor) -> FusionOutput:
        """embeddings: (B, D_in) per modality; valid: (B, M) bool in the order of the package's modalities."""
        raise NotImplementedError


def zero_missing(x: Tensor, valid: Tensor | None) -> Tensor:
    """Zero the rows of `x` (B, D) where `valid` (B,) bool is False; None means that no row is missing.

    It selects instead of multiplying: 0 * NaN is NaN, in the output and in the gradient.
    """
    return x if valid is None else torch.where(valid.unsqueeze(-1), x, 0.0)


class OutputLinear(nn.Linear):
    """The last layer of a price model: an nn.Linear that computes in float32, even inside autocast.

    bf16 keeps eight significant bits. A log price between 2 and 4 would lie on a grid of 1/64, and the price
    on steps of 1.6 %. The hidden layers can afford that; the price cannot.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Dropout(nn.Dropout):
    """nn.Dropout with a faster mask on the CPU.

    torch draws a CPU mask one random number per element, on one thread, which took a tenth of the training
    step. Here one random number of 64 bits serves eight elements: each element reads eight of the bits as a
    number from −128 to 127 and is kept if that number is high enough. A chance that is no multiple of 1/256
    reads sixteen bits per element and is rounded to a multiple of 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        if (self.p * 2**8).is_integer():
            bits, lane = 8, torch.int8
        else:
            bits, lane = 16, torch.int16
        words = math.ceil(x.numel() * bits / 64)
        random_words = torch.empty(words, dtype=torch.int64).random_(-(2**63), None)
        # the same memory, read as one small signed number per element; the last word may hold some too many
        drawn = random_words.view(lane)[: x.numel()].view(x.shape)
        lowest = -(2 ** (bits - 1))
        kept = drawn >= lowest + round(self.p * 2**bits)
        # a product with 0 or 1 / (1 − p), as torch does it; torch.where would be slower
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


class EmbeddingBranch(nn.Module):
    """Bring one encoder's embedding to the fused width: scale × Linear → LayerNorm → GELU → dropout.

    The learnable scale multiplies the embedding before the bias is added. Behind the bias, the LayerNorm
    would cancel it.

    Args:
        d_in: encoder width D_in.
        d_out: fused width D.
        depth: 1, or 2 for a further layer of width `hidden` in between (D_in → 768 → D), which is a known
            failure and kept as an ablation.

    Raises:
        InputError: another depth.
    """

    def __init__(self, *, d_in: int, d_out: int, dropout: float, depth: int = 1, hidden: int = 768):
        super().__init__()
        if depth not in (1, 2):
            raise InputError(f"branch depth {depth} is not 1 or 2")
        widths = (d_in, d_out) if depth == 1 else (d_in, hidden, d_out)
        self.scale = nn.Parameter(torch.ones(1))
        self.layers = nn.Sequential()
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            self.layers.append(
                nn.Sequential(
                    nn.Linear(width_in, width_out), nn.LayerNorm(width_out), nn.GELU(), Dropout(dropout)
                )
            )

    def forward(self, embedding: Tensor, valid: Tensor | None = None) -> Tensor:
        """embedding (B, D_in), valid (B,) bool or None → (B, D), zero where the embedding is missing."""
        first: Any = self.layers[0]
        linear, norm, activation, dropout = first
        # The scale is applied to the product W x instead of to x. The result is the same, but the gradient of
        # the scale then needs no gradient of the input, which would cost another product with the weights.
        x = F.linear(zero_missing(embedding, valid), linear.weight)  # (B, D)
        x = torch.addcmul(linear.bias, self.scale, x)  # bias + scale · W x
        x = dropout(activation(norm(x)))
        if len(self.layers) == 2:
            x = self.layers[1](x)
        if valid is None:
            return x
        # The branch turns a row of zeros into something else, because of its biases. By now every value is
        # finite, so a product will do, which is five times as fast as `zero_missing`.
        return x * valid.unsqueeze(-1)


class AttentionBlock(nn.Module):
    """Multi-head cross-attention, residual, LayerNorm: LayerNorm(q + W_o Attention(q, kv)).

    With a single key the softmax is 1, and the block is exactly LayerNorm(q + W_o W_v kv): nothing is
    weighted per product, and the query and key projections receive no gradient. `short_path` then computes
    just that from the same parameters. Without it the full attention runs, to the same result. The unused
    projections stay in the state dict, so both forms load each other's checkpoints. In the short form their
    gradient is None (DDP would need find_unused_parameters). In the full form it is rounding noise, which
    Adam scales up to steps of full size: these weights wander without any effect.

    Dropout acts on what attention adds, not on its weights. On a single weight of 1 it would switch off whole
    heads, and the two forms would differ.

    Attention as in Vaswani et al. 2017, "Attention is all you need", equation 1, post-norm.

    Raises:
        InputError: `heads` does not divide `width`.
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
            key_valid: bool, (B,) for all keys of a row or (B, T_kv); None means that no key is missing.

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
            has_key = key_valid.any(dim=1)  # (B,)
            attended = attended * has_key[:, None, None]
        return self.norm(q + attended).view_as(query)

    def _attend(self, q: Tensor, kv: Tensor, key_valid: Tensor | None) -> Tensor:
        """Attention of q (B, T, D) over kv (B, T_kv, D), heads side by side: (B, T, D)."""
        q = self._split_heads(self.query(q))
        k = self._split_heads(self.key(kv))
        v = self._split_heads(self.value(kv))
        mask = None
        if key_valid is not None:
            # A row with no key left would be a softmax over nothing, NaN. Such a row looks at its keys, which
            # are zeros.
            no_key = ~key_valid.any(dim=1, keepdim=True)  # (B, 1)
            mask = (key_valid | no_key)[:, None, None, :]  # (B, 1, 1, T_kv)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, D/H)
        return attended.transpose(1, 2).flatten(2)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, H, T, D/H)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ProductPerExpert(torch.autograd.Function):
    """torch.baddbmm(bias, h, weight), computed as one matrix product per expert.

    On a CPU a batched product deals whole matrices to the cores, so that three experts on two cores take as
    long as four would. One product per expert uses all cores for each. Its gradient is written straight into
    its slice of the stacked weight's gradient; had autograd to index the weight, it would add up a full-sized
    gradient per expert.
    """

    @staticmethod
    def forward(ctx, bias: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        """bias (E, 1, D_out), h (E, B, D), weight (E, D, D_out) → (E, B, D_out)."""
        ctx.save_for_backward(h, weight)
        experts, rows, _ = h.shape
        out = h.new_empty(experts, rows, weight.shape[2])
        for expert in range(experts):
            torch.addmm(bias[expert], h[expert], weight[expert], out=out[expert])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """grad (E, B, D_out) → the gradients of bias, h and weight."""
        h, weight = ctx.saved_tensors
        grad_h = torch.empty_like(
            h
        )  # it keeps the strides of h, a transposed view, so nothing is copied behind it
        grad_weight = torch.empty_like(weight)
        for expert in range(len(weight)):
            torch.mm(grad[expert], weight[expert].T, out=grad_h[expert])
            torch.mm(h[expert].T, grad[expert], out=grad_weight[expert])
        grad_bias = grad.sum(dim=1, keepdim=True)
        return grad_bias, grad_h, grad_weight


def expert_products(bias: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """One layer of all experts: bias (E, 1, D_out) + h (E, B, D) @ weight (E, D, D_out) → (E, B, D_out).

    On a GPU, and for a few rows, launching the products is what costs: there one batched product is faster.
    Inside autocast the batched product is needed too, as `ProductPerExpert` would not be cast.
    """
    many_rows = h.shape[1] >= 64
    if h.device.type == "cpu" and many_rows and not torch.is_autocast_enabled("cpu"):
        return ProductPerExpert.apply(bias, h, weight)
    return torch.baddbmm(bias, h, weight)


class MixtureOfExperts(nn.Module):
    """Dense mixture: every expert sees every row, and gate = softmax(Linear(x)) weighs their outputs.

    An expert is Linear → GELU → dropout for each hidden width, then Linear to `d_out`. All experts read the
    same x, so their first layers are one wide Linear; the weights of the layers above are stacked. The gate,
    the last layer and the mixture are the output of a price model and are computed in float32, as in
    `OutputLinear`.

    Jacobs et al. 1991, "Adaptive mixtures of local experts"; without sparsity or a balancing loss.

    Raises:
        InputError: `experts` is below 1.
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
        self.gate = OutputLinear(d_in, experts)
        self.first = nn.Linear(d_in, experts * hidden[0])
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for width_in, width_out in zip(hidden, (*hidden[1:], d_out), strict=True):
            self.weights.append(torch.empty(experts, width_in, width_out))
            self.biases.append(torch.empty(experts, 1, width_out))
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
        experts = self.gate.out_features
        layers = [(self.first.weight.chunk(experts)[number], self.first.bias.chunk(experts)[number])]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            layers.append((weight[number].T, bias[number, 0]))
        return layers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D) → mixed output (B, d_out), gate (B, E) whose rows sum to 1; both float32."""
        gate = self.gate(x).softmax(dim=-1)  # (B, E)
        h = self.dropout(F.gelu(self.first(x)))  # (B, E·D_hidden), the experts side by side
        h = h.unflatten(1, (gate.shape[1], -1)).transpose(0, 1)  # (E, B, D_hidden)
        for layer in range(len(self.weights) - 1):
            h = expert_products(self.biases[layer], h, self.weights[layer])
            h = self.dropout(F.gelu(h))
        with torch.autocast(x.device.type, enabled=False):
            h = h.to(self.weights[-1].dtype)
            outputs = expert_products(self.biases[-1], h, self.weights[-1])  # (E, B, d_out)
            mixed = torch.einsum("be,ebo->bo", gate, outputs)
        return mixed, gate
