"""What share of a decision the text has, and what share the fields.

Legend: B rows, N rows of a table.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusion.qwen_clip.gate import GateFusion
from fusion.qwen_clip.moe import MoEFusion
from text_tabular.data import Inputs, by_length
from text_tabular.model import Batch, OneSide, TextTabular


@torch.no_grad()
def text_share(model: TextTabular, batch: Batch) -> Tensor:
    """The text's share of the decision, (B,) between 0 and 1; the fields have the rest.

    gate: the mean of its channels. moe: what the router gives. concat and cross_attention weigh nothing themselves, so
    each side is left out in turn: its share is how far that moves the output of the predicted class, in relation to
    both moves together.
    """
    design = model.design
    text, fields = model.branches(batch)
    valid = batch.text_valid, batch.fields_valid
    if isinstance(design, OneSide):
        return torch.full((len(text),), float(design.side == "text"), device=text.device)
    if isinstance(design, GateFusion):
        return design.weigh(*design.project(text, fields, *valid), *valid).mean(dim=1)
    if isinstance(design, MoEFusion):
        shares = design.route(text * valid[0].unsqueeze(1), fields * valid[1].unsqueeze(1), *valid)
        return shares[:, 0]
    nobody = torch.zeros_like(batch.text_valid)
    output = design(text, fields, *valid)
    moved_by_text = _moved(output, design(text, fields, nobody, batch.fields_valid))
    moved_by_fields = _moved(output, design(text, fields, batch.text_valid, nobody))
    return moved_by_text / (moved_by_text + moved_by_fields).clamp(min=1e-9)


def _moved(output: Tensor, without: Tensor) -> Tensor:
    """(B,) how far the output of the predicted class, or the number, moves when a side is left out."""
    if output.dim() == 1:
        return (output - without).abs()
    predicted = output.argmax(dim=1, keepdim=True)
    # a class is predicted by its lead over the others, so logits count relative to their mean
    lead = (output - output.mean(dim=1, keepdim=True)).gather(1, predicted)
    lead_without = (without - without.mean(dim=1, keepdim=True)).gather(1, predicted)
    return (lead - lead_without).abs().squeeze(1)


def text_shares(model: TextTabular, inputs: Inputs, rows: np.ndarray, batch_size: int) -> np.ndarray:
    """The text's share (n,) of each row at these positions."""
    model.eval()
    device = next(model.parameters()).device
    shares = np.empty(len(inputs))
    for batch in by_length(inputs.lengths, rows, batch_size):
        shares[batch] = text_share(model, inputs.batch(batch).to(device)).float().cpu().numpy()
    return shares[rows]
