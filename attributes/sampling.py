"""Drawing replies from the model.

Every prompt is read once, and its replies share that work. The sampler is our own because `generate` mixes in whatever
a checkpoint's generation_config holds: with the `top_k=1` of published ones, seven chains at temperature 1 are
identical. Here a token depends on the logits, the temperature and one number per step, and on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from attributes.model import Prompt, VisionLanguage


@dataclass(frozen=True)
class Reply:
    """One drawn reply."""

    ids: tuple[int, ...]
    """with the end mark, where there was one"""
    ended: bool
    log_probability: float
    """of all its tokens together, at temperature 1"""


def random_numbers(
    seed: int, sample_id: str, attribute: str, round_: int, *, chains: int, tokens: int
) -> np.ndarray:
    """(chains, tokens) numbers in [0, 1), the same whatever else is drawn before, beside or after them."""
    digest = hashlib.sha256(f"{sample_id}\n{attribute}".encode()).digest()
    generator = np.random.default_rng([seed, round_, *digest])
    return generator.random((chains, tokens))


@torch.inference_mode()
def draw(
    language: VisionLanguage,
    prompts: Sequence[Prompt],
    *,
    numbers: np.ndarray | None,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[list[Reply]]:
    """Replies to B prompts.

    Args:
        numbers: (B, replies, tokens) in [0, 1), at least `max_new_tokens` tokens; a token is the one at which the
            cumulative probability passes its number. None takes the most probable token, for one reply per prompt.
    """
    from transformers import DynamicCache

    language.model.eval()
    device = language.device
    per_prompt = 1 if numbers is None else numbers.shape[1]
    batch = language.batch(prompts)
    cache = DynamicCache(config=language.base.config.get_text_config())
    logits = language.logits(batch, keep=1, past_key_values=cache, use_cache=True)[:, 0]

    cache.batch_repeat_interleave(per_prompt)
    logits = logits.repeat_interleave(per_prompt, dim=0)  # (R, V), R = B · replies
    valid = batch.valid.long().repeat_interleave(per_prompt, dim=0)
    next_position = batch.positions.amax(dim=(0, 2)).repeat_interleave(per_prompt) + 1  # (R,)
    flat = None if numbers is None else torch.from_numpy(numbers.reshape(-1, numbers.shape[2])).to(device)

    replies = len(logits)
    ended = torch.zeros(replies, dtype=torch.bool, device=device)
    log_probability = torch.zeros(replies, device=device)
    drawn: list[Tensor] = []
    for step in range(max_new_tokens):
        # a drawn placeholder would stand for a picture that is not there
        allowed = logits.index_fill(1, torch.tensor([language.image_token], device=device), -torch.inf)
        tokens = choose(allowed, None if flat is None else flat[:, step], temperature)
        of_token = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        log_probability += of_token.masked_fill(ended, 0.0)
        drawn.append(tokens.masked_fill(ended, -1))
        ended |= tokens == language.end_token
        if step + 1 == max_new_tokens or bool(ended.all()):
            break
        valid = torch.cat([valid, valid.new_ones(replies, 1)], dim=1)
        output = language.model(
            input_ids=tokens[:, None],
            attention_mask=valid,
            position_ids=next_position[None, :, None].expand(3, replies, 1),
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1].float()
        next_position = next_position + 1

    ids = torch.stack(drawn, dim=1).tolist()
    made = []
    for row, tokens_of_row in enumerate(ids):
        kept = tuple(token for token in tokens_of_row if token >= 0)
        made.append(Reply(kept, bool(ended[row]), float(log_probability[row])))
    return [made[start : start + per_prompt] for start in range(0, replies, per_prompt)]


def choose(logits: Tensor, numbers: Tensor | None, temperature: float) -> Tensor:
    """(R,) token ids from logits (R, V): the most probable ones, or those that the numbers (R,) fall on."""
    if numbers is None:
        return logits.argmax(dim=-1)
    # float64, since 150,000 float32 probabilities do not add up to 1; Apple's GPU has none
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = (logits.to(wide) / temperature).softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(cumulative, numbers.to(wide)[:, None].contiguous(), right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1)
