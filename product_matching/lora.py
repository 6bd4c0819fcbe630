"""LoRA adapters on a sentence encoder (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

The layers are listed here in full, and a name without a layer is an error, because peft alone would let two mistakes
pass. It skips a name that matches no layer as long as another name matches one. And "all linear layers" includes the
pooler, which mean pooling never calls: its adapters would never receive a gradient.
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
"""Attention and dense layers of one transformer block, by the model_type of transformers."""


def target_layers(transformer: nn.Module, target_modules: str = "auto") -> list[str]:
    """Full names of the linear layers that get adapters.

    Args:
        transformer: a model of transformers.
        target_modules: "auto", or comma-separated ends of layer names, such as "query,value".

    Raises:
        InputError: "auto" does not know the architecture, or no linear layer ends in one of the names.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    layers = set()
    absent = []
    for target, pattern in _patterns(transformer.config.model_type, target_modules).items():
        found = [name for name in linear if re.fullmatch(pattern, name)]
        layers.update(found)
        if not found:
            absent.append(target)
    if absent:
        present = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise InputError(
            f"--target-modules: no linear layer is called {', '.join(absent)}; there are {', '.join(present)}"
        )
    return sorted(layers)


def _patterns(architecture: str, target_modules: str) -> dict[str, str]:
    """For each wanted target, the regular expression that the full name of its layers matches."""
    if target_modules != "auto":
        targets = [target.strip() for target in target_modules.split(",")]
        return {target: rf"(.*\.)?{re.escape(target)}" for target in targets}
    if architecture not in LAYERS_OF_ARCHITECTURE:
        known = ", ".join(LAYERS_OF_ARCHITECTURE)
        raise InputError(
            f"--target-modules auto knows {known}, not {architecture}; name its layers, such as q_lin,v_lin"
        )
    # "layer.<number>." keeps the pooler out, and keeps output.dense apart from attention.output.dense
    targets = LAYERS_OF_ARCHITECTURE[architecture]
    return {target: rf".*layer\.\d+\.{re.escape(target)}" for target in targets}


def add_lora(
    transformer: nn.Module, *, rank: int, alpha: int, dropout: float, target_modules: str = "auto"
) -> LoraModel:
    """Put adapters into `transformer` in place and freeze everything else.

    `merge_and_unload` of the returned wrapper adds the adapters to the weights and removes them again.
    """
    guard_torchvision()
    from peft import LoraConfig, LoraModel

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_layers(transformer, target_modules),
    )
    return LoraModel(transformer, config, "default")


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that receive a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
