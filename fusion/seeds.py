"""Several models that differ in their seed only, as one model.

Legend: B batch, M modalities, S seeds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusion.blocks import FusionOutput, PriceModel
from fusion.target import Target


class SeedAverage(PriceModel):
    """The price whose logarithm is the mean of the models' ln prices: the geometric mean of their prices.

    The gates of the models are not averaged, because expert 0 of one model has nothing to do with expert 0 of another.

    Args:
        models: S models of the same inputs.
        target: what their outputs mean. It is the same for all, as they were fitted on the same rows.
    """

    def __init__(self, models: list[PriceModel], target: Target):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.target = target

    def forward(self, embeddings: dict[str, Tensor], valid: Tensor) -> FusionOutput:
        """embeddings: (B, D_in) per modality; valid: (B, M) bool → log1p(price) (B,)."""
        ln_prices = []
        for model in self.models:
            log_price = self.target.log_price(model(embeddings, valid))  # (B,)
            ln_prices.append(log_price.expm1().log())
        mean_ln_price = torch.stack(ln_prices).mean(dim=0)  # (S, B) → (B,)
        return self.target.output_of(mean_ln_price.exp().log1p())
