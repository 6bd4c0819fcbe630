"""Sampled chains on disk: one file per shard of listings, so that an interrupted sampling continues.

`attributes/chains_<run>_<table>_<round>/00000.jsonl` has one line per question: sample_id, attribute, chains, and a
reason where nothing could be shown. `00000.jsonl.json` holds the shard's fingerprint. A shard is made again when the
adapter, its base, the schema, a prompt, a picture or the sampling has changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from attributes.chains import (
    Chain,
    Consensus,
    Question,
    chain_from_json,
    chain_to_json,
    consensus,
    prompt,
    read_chain,
)
from attributes.config import SamplingSettings
from attributes.data import Listing
from attributes.model import VisionLanguage, fingerprint
from attributes.sampling import Reply, draw, random_numbers
from attributes.schema import Schema
from contracts.errors import InputError
from contracts.files import atomic_write, read_json, sidecar_of, write_json
from training.processes import process

INDEX = "index.json"
"""Written last: which adapter has sampled, and the names of the shards."""
NOTHING_TO_SEE = "neither a readable picture nor a text"
MOST_IDENTICAL = 0.99
"""Share of the listings whose chains may all be identical."""


def chains_folder(workspace: Path, run: str, table: str, number: int) -> Path:
    """Where the chains of a run, a table and a round lie."""
    name = f"{run}_{table}_{number}".replace("/", "_")
    return workspace / "attributes" / f"chains_{name}"


@dataclass(frozen=True)
class Answered:
    """One question and its chains."""

    question: Question
    chains: tuple[Chain, ...]
    reason: str = ""
    """why there are no chains"""

    @property
    def consensus(self) -> Consensus:
        return consensus([chain.answer for chain in self.chains])


@dataclass
class ChainShards:
    """The chains of one run, one table and one round.

    Args:
        folder: receives the shards.
        adapter: hash of the adapter that samples.
    """

    folder: Path
    language: VisionLanguage
    adapter: str
    settings: SamplingSettings
    schema: Schema
    made: int = field(default=0, init=False)
    """shards that this process has sampled"""

    def complete(self, listings: Sequence[Listing]) -> None:
        """Sample the shards that are missing. Under torchrun the processes share them."""
        rank, processes = process()
        shards = self._divide(listings)
        own = range(rank, len(shards), processes)
        for number in tqdm(own, desc="sample", unit="shard", delay=2, leave=False, disable=rank > 0):
            questions = self._questions(shards[number])
            mark = self._fingerprint(questions)
            if self._is_current(number, mark):
                continue
            self.language.show(
                name for listing in shards[number] for name in self.language.pictures_of(listing)
            )
            self._write(number, self._sample(questions), mark)
            self.language.forget()
            self.made += 1
        if processes > 1:
            from torch import distributed

            distributed.barrier()

    def finish(self, listings: Sequence[Listing]) -> list[Answered]:
        """Write the index, remove shards of an earlier and longer table, and return all chains in order."""
        files = [self._file(number) for number in range(len(self._divide(listings)))]
        for other in set(self.folder.glob("*.jsonl")) - set(files):
            sidecar_of(other).unlink(missing_ok=True)
            other.unlink()
        write_json(self.folder / INDEX, {"adapter": self.adapter, "shards": [file.name for file in files]})
        return read_chains(self.folder, listings, self.schema, adapter=self.adapter)

    def _divide(self, listings: Sequence[Listing]) -> list[Sequence[Listing]]:
        size = self.settings.shard_listings
        return [listings[start : start + size] for start in range(0, len(listings), size)]

    def _questions(self, listings: Sequence[Listing]) -> list[Question]:
        questions = []
        for listing in listings:
            questions += [
                Question(listing, attribute) for attribute in self.schema.attributes_of(listing.vertical)
            ]
        return questions

    def _sample(self, questions: list[Question]) -> list[Answered]:
        settings = self.settings
        asked = [question for question in questions if not self.language.is_empty(question)]
        chains: dict[tuple[str, str], tuple[Chain, ...]] = {}
        for start in range(0, len(asked), settings.batch_size):
            batch = asked[start : start + settings.batch_size]
            for question, drawn in zip(batch, sample_chains(self.language, batch, settings), strict=True):
                chains[question.key] = drawn
        answered = []
        for question in questions:
            own = chains.get(question.key, ())
            answered.append(Answered(question, own, "" if own else NOTHING_TO_SEE))
        return answered

    def _write(self, number: int, answered: list[Answered], mark: str) -> None:
        file = self._file(number)
        sidecar_of(file).unlink(missing_ok=True)
        with atomic_write(file) as lines:
            for each in answered:
                sample_id, attribute = each.question.key
                line = {
                    "sample_id": sample_id,
                    "attribute": attribute,
                    "reason": each.reason,
                    "chains": [chain_to_json(chain) for chain in each.chains],
                }
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        write_json(sidecar_of(file), {"fingerprint": mark})

    def _fingerprint(self, questions: list[Question]) -> str:
        settings = self.settings
        spec = self.language.spec
        sampling = [settings.chains, settings.temperature, settings.max_new_tokens, settings.batch_size]
        random = [settings.seed, settings.round, settings.precision]
        asked = []
        for question in questions:
            listing = question.listing
            shown = self.language.pictures_of(listing)
            text = "" if spec.input == "pictures" else listing.text
            whole = prompt(question, pictures=len(shown), text=text, reasoning=spec.reasoning)
            asked.append(
                [*question.key, whole, question.attribute.spellings, [self._picture(name) for name in shown]]
            )
        return fingerprint(self.adapter, asdict(spec), sampling, random, asked)

    def _picture(self, name: str) -> list[str | int]:
        """A picture's name and size on disk, which changes when it is replaced."""
        path = None if self.language.images is None else self.language.images / name
        return [name, path.stat().st_size if path is not None and path.is_file() else -1]

    def _is_current(self, number: int, mark: str) -> bool:
        sidecar = sidecar_of(self._file(number))
        return sidecar.is_file() and read_json(sidecar).get("fingerprint") == mark

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.jsonl"


def read_chains(folder: Path, listings: Sequence[Listing], schema: Schema, *, adapter: str) -> list[Answered]:
    """All chains of a finished sampling, joined to their questions by sample_id and attribute.

    Raises:
        InputError: there are none, another adapter has sampled them, or a listing or an attribute is not there any
            more.
    """
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder}: no finished chains; run python -m attributes.sample_chains")
    index = read_json(folder / INDEX)
    if index["adapter"] != adapter:
        raise InputError(
            f"{folder}: sampled by another adapter; run python -m attributes.sample_chains again"
        )
    by_id = {listing.sample_id: listing for listing in listings}
    answered = []
    for name in index["shards"]:
        for line in (folder / name).read_text("utf-8").splitlines():
            content = json.loads(line)
            listing = by_id.get(content["sample_id"])
            attribute = None if listing is None else schema.attribute(listing.vertical, content["attribute"])
            if listing is None or attribute is None:
                raise InputError(
                    f"{folder / name}: {content['attribute']} of sample_id {content['sample_id']} is not in table and "
                    "schema; sample the chains again"
                )
            chains = tuple(chain_from_json(chain) for chain in content["chains"])
            answered.append(Answered(Question(listing, attribute), chains, content["reason"]))
    return answered


def sample_chains(
    language: VisionLanguage, questions: Sequence[Question], settings: SamplingSettings
) -> list[tuple[Chain, ...]]:
    """`settings.chains` chains for each question; their pictures must have been shown."""
    numbers = [
        random_numbers(
            settings.seed, *question.key, settings.round,
            chains=settings.chains, tokens=settings.max_new_tokens,
        )
        for question in questions
    ]  # fmt: skip
    prompts = [language.prompt(question) for question in questions]
    replies = draw(
        language, prompts, numbers=np.stack(numbers),
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
    )  # fmt: skip
    made = []
    for question, drawn in zip(questions, replies, strict=True):
        made.append(tuple(as_chain(language, question, reply) for reply in drawn))
    return made


def as_chain(language: VisionLanguage, question: Question, reply: Reply) -> Chain:
    text = language.tokenizer.decode(reply.ids, skip_special_tokens=True)
    return read_chain(reply, text, question.attribute)


def require_variety(answered: Sequence[Answered]) -> None:
    """Raise InputError where the chains of nearly all listings are identical: agreement would then say nothing."""
    distinct: dict[str, bool] = {}
    for each in answered:
        if len(each.chains) > 1:
            varied = len({chain.ids for chain in each.chains}) > 1
            sample_id = each.question.listing.sample_id
            distinct[sample_id] = distinct.get(sample_id, False) or varied
    if not distinct:
        return
    share = 1 - sum(distinct.values()) / len(distinct)
    if share > MOST_IDENTICAL:
        raise InputError(
            f"the chains of {share:.0%} of the listings are identical, so their agreement says nothing; "
            "raise --temperature, or train the SFT run for fewer epochs"
        )
