"""LoRA adapters on a sentence encoder (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

peft quietly skips a name that matches no layer as long as another one does, and a pooler that mean pooling never
calls can carry adapters without a gradient. So the layers are listed here in full, and a name without a layer is
an error.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from contracts.errors import InputError
from training.device import guard_torchvision

if TYPE_CHECKING:
    from peft import LoraModel

_BERT = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
_MPNET = (
    "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o",
    "intermediate.dense", "output.dense",
)  # fmt: skip
LAYERS_OF_ARCHITECTURE = {"bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "mpnet": _MPNET}
"""Attention and dense layers of one transformer block, by transformers' model_type."""


def target_layers(transformer: nn.Module, targets: str = "auto") -> list[str]:
    """Full names of the linear layers that get adapters.

    Args:
        transformer: a transformers model.
        targets: "auto", or comma-separated ends of layer names, such as "query,value" or "attention.output.dense".

    Raises:
        InputError: an architecture that "auto" does not know, or a name that no linear layer ends in.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if targets != "auto":
        wanted = {target.strip(): rf"(.*\.)?{re.escape(target.strip())}" for target in targets.split(",")}
    else:
        architecture = transformer.config.model_type
        if architecture not in LAYERS_OF_ARCHITECTURE:
            known = ", ".join(LAYERS_OF_ARCHITECTURE)
            raise InputError(
                f"--lora-targets auto knows {known}, not {architecture}; name its layers, such as q_lin,v_lin"
            )
        wanted = {name: rf".*layer\.\d+\.{re.escape(name)}" for name in LAYERS_OF_ARCHITECTURE[architecture]}
    found = {
        target: [name for name in linear if re.fullmatch(pattern, name)] for target, pattern in wanted.items()
    }
    if absent := [target for target, names in found.items() if not names]:
        ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise InputError(
            f"--lora-targets: no linear layer is called {', '.join(absent)}; there are {', '.join(ends)}"
        )
    return sorted({name for names in found.values() for name in names})


def add_lora(
    transformer: nn.Module, *, rank: int, alpha: int, dropout: float, targets: str = "auto"
) -> LoraModel:
    """Put adapters into `transformer`, in place, and freeze everything else. `merge_and_unload` takes them out."""
    guard_torchvision()
    from peft import LoraConfig, LoraModel

    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_layers(transformer, targets)
    )
    return LoraModel(transformer, config, "default")


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that receive a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
