"""Reasoning chains: what is asked, what is answered, and what several answers to one question say together.

The form of a prompt is that of Qwen's chat template. Consensus and confidence are those of self-consistency (Wang et
al., 2023, arXiv 2203.11171): the most frequent answer, and the share of the chains that give it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attributes.data import Label, Listing
from attributes.sampling import Reply
from attributes.schema import UNKNOWN, Attribute

SYSTEM = "You are a helpful assistant."
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
"""Stands for one picture; the model's side repeats <|image_pad|> for every vector of the picture."""
END = "<|im_end|>"
_ANSWER = re.compile(r"answer\s*:\s*(.*)", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """One attribute of one listing, as the model is asked for it."""

    listing: Listing
    attribute: Attribute

    @property
    def key(self) -> tuple[str, str]:
        return self.listing.sample_id, self.attribute.name


@dataclass(frozen=True)
class Chain:
    """One sampled reply."""

    ids: tuple[int, ...]
    """sampled tokens, with the end mark where there was one; training reads these and never the text"""
    text: str
    answer: str | None
    """canonical value; None where the reply has no answer, one that the schema does not allow, or no end"""
    truncated: bool
    """whether the limit of tokens was reached before the end mark"""
    log_probability: float = 0.0
    """of all its tokens together, by the model that drew it, at temperature 1"""


@dataclass(frozen=True)
class Consensus:
    """What the chains of one question say together."""

    value: str | None
    """most frequent answer; None where two answers tie or no chain has an answer"""
    consistency: float
    """votes for the most frequent answer / number of chains, the ones without an answer included"""
    unanimous: bool
    """whether every chain gives this answer"""


def prompt(question: Question, *, pictures: int, text: str, reasoning: bool) -> str:
    """The prompt up to where the reply begins.

    Args:
        pictures: number of pictures that are shown.
        text: of the listing, "" for none.
        reasoning: ask for steps before the answer.
    """
    attribute = question.attribute
    # a listing must not be able to end its own turn
    listed_text = f"Listing: {text.replace('<|', '< |')}\n" if text else ""
    allowed = ""
    if attribute.kind == "closed":
        allowed = f"Values: {', '.join((*attribute.values, UNKNOWN))}\n"
    elif attribute.kind == "number":
        allowed = "Values: a number, unknown\n"
    how = 'Think step by step, then end with "Answer: value".' if reasoning else 'Reply only "Answer: value".'
    return (
        f"<|im_start|>system\n{SYSTEM}{END}\n<|im_start|>user\n{PICTURE * pictures}{listed_text}"
        f"{attribute.question}\n{allowed}{how}{END}\n<|im_start|>assistant\n"
    )


def target(label: Label, *, reasoning: bool) -> str:
    """The reply that a label asks for, without the end mark."""
    steps = f"{label.reasoning.strip()}\n" if reasoning and label.reasoning.strip() else ""
    return f"{steps}Answer: {label.value}"


def parse(text: str, attribute: Attribute) -> str | None:
    """The canonical answer of a reply: what its last "Answer:" says, or None."""
    found = _ANSWER.findall(text)
    return attribute.canonical(found[-1]) if found else None


def read_chain(reply: Reply, text: str, attribute: Attribute) -> Chain:
    """A drawn reply with its answer. A truncated one has none: what it would have said is not known."""
    answer = parse(text, attribute) if reply.ended else None
    return Chain(reply.ids, text, answer, not reply.ended, reply.log_probability)


def consensus(answers: Sequence[str | None]) -> Consensus:
    """The answer of most chains and its share of all of them; None stands for a chain without an answer."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return Consensus(None, 0.0, False)
    (value, most), *others = votes.most_common()
    share = most / len(answers)
    if others and others[0][1] == most:
        return Consensus(None, share, False)
    return Consensus(value, share, most == len(answers))


def chain_to_json(chain: Chain) -> dict[str, Any]:
    return asdict(chain)


def chain_from_json(content: dict[str, Any]) -> Chain:
    return Chain(**{**content, "ids": tuple(content["ids"])})
