"""The vision-language model: loading, LoRA, vectors of pictures that are computed once, log-probabilities.

The vision tower is frozen, so a picture's vectors never change: each picture goes through it once, and the language
model gets the vectors (`mm_encoder_outputs`).

Legend: B prompts, R replies, P vectors of a picture, D width of the language model, V vocabulary, T tokens of a
prompt, S tokens of a reply.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attributes.chains import END, Question, prompt
from attributes.config import SIDE
from attributes.data import Listing
from attributes.schema import Schema
from contracts.errors import InputError
from contracts.files import read_versioned, sha256_file, write_json
from training.device import choose_dtype, guard_torchvision, missing_model, require_model_source
from training.pictures import UnreadablePicture, open_picture
from training.weights import weights_hash

guard_torchvision()

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl")
TARGETS = r".*language_model.*\.(q_proj|v_proj)"
"""Layers with an adapter. The towers of both architectures have one layer for query, key and value, called qkv."""
IMAGE_TOKEN = "<|image_pad|>"
SPEC_SCHEMA = 1
ADAPTER = "adapter"
SPEC_FILE = "model.json"
SCHEMA_FILE = "schema.yaml"


@dataclass(frozen=True)
class Spec:
    """What the adapter alone does not say: its base, and how listings are read. Lies in every run folder."""

    model: str
    """hub id or folder of the base"""
    base: str
    """identifies the weights of the base"""
    input: str
    fit: str
    text_tokens: int
    reasoning: bool

    def save(self, folder: Path) -> None:
        write_json(folder / SPEC_FILE, {"schema": SPEC_SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Spec:
        content = read_versioned(folder / SPEC_FILE, SPEC_SCHEMA, "train it again")
        content.pop("schema")
        return cls(**content)


@dataclass
class Prompt:
    """One question as token ids, and the pictures it shows."""

    ids: list[int]
    pictures: list[str]


@dataclass
class Batch:
    """Prompts, padded on the left, with their replies, padded on the right."""

    input_ids: Tensor
    """(B, T + S)"""
    valid: Tensor
    """(B, T + S) bool"""
    positions: Tensor
    """(3, B, T + S): time, height and width of the multimodal rotary positions"""
    pictures: Tensor | None
    """(vectors of all pictures of the batch, D), in the order of the placeholders"""
    reply_tokens: int
    """S; 0 for prompts alone"""


class VisionLanguage:
    """A model with its tokenizer, and everything that turns questions into its inputs.

    Args:
        model: of one of ARCHITECTURES, with or without adapters.
        images: folder of the pictures.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, image_processor: Any, spec: Spec, images: Path | None
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.spec = spec
        self.images = images
        self.unreadable: dict[str, str] = {}
        """pictures that cannot be shown, with the reason"""
        self._vectors: dict[str, Tensor] = {}
        self.image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.end_token = tokenizer.convert_tokens_to_ids(END)
        if self.image_token is None or self.end_token is None:
            raise InputError(f"model {spec.model}: its tokenizer lacks {IMAGE_TOKEN} or {END}")

    @property
    def base(self) -> nn.Module:
        """The model of transformers inside the wrapper of peft."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vectors_per_picture(self) -> int:
        vision = self.base.config.vision_config
        return (SIDE // (vision.patch_size * vision.spatial_merge_size)) ** 2

    def show(self, pictures: Iterable[str], *, batch_size: int = 16) -> None:
        """Encode the pictures that have not been encoded yet; what cannot be read is noted in `unreadable`."""
        known = self._vectors.keys() | self.unreadable.keys()
        new = [name for name in dict.fromkeys(pictures) if name not in known]
        for start in range(0, len(new), batch_size):
            names, squares = [], []
            for name in new[start : start + batch_size]:
                try:
                    squares.append(read_square(self.images, name, self.spec.fit))
                    names.append(name)
                except UnreadablePicture as error:
                    self.unreadable[name] = str(error)
            if names:
                with torch.no_grad():
                    encoded = self.encode(squares)
                self.show_vectors({name: own.cpu() for name, own in zip(names, encoded, strict=True)})

    def show_vectors(self, vectors: dict[str, Tensor]) -> None:
        """Take vectors (P, D) of pictures by name."""
        self._vectors |= vectors

    def forget(self) -> None:
        """Free the vectors of the pictures that were shown."""
        self._vectors.clear()

    def encode(self, squares: Sequence[Any]) -> list[Tensor]:
        """One tensor (P, D) for each picture of SIDE by SIDE pixels, by the tower."""
        inputs = self.image_processor(images=list(squares), do_resize=False, return_tensors="pt").to(
            self.device
        )
        features = self.base.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
        return list(features.pooler_output)

    def pictures_of(self, listing: Listing) -> tuple[str, ...]:
        """The pictures that the model looks at, readable or not."""
        return () if self.spec.input == "text" else listing.pictures

    def readable(self, question: Question) -> list[str]:
        """The pictures of a question that the model sees. `show` must have been called with them."""
        return [name for name in self.pictures_of(question.listing) if name not in self.unreadable]

    def shown_text(self, question: Question) -> str:
        """The listing's text as the model sees it, at most `text_tokens` tokens of it."""
        text = question.listing.text if self.spec.input != "pictures" else ""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if len(ids) <= self.spec.text_tokens:
            return text
        return self.tokenizer.decode(ids[: self.spec.text_tokens]).rstrip("\ufffd")

    def is_empty(self, question: Question) -> bool:
        """Whether the model sees neither a picture nor a text of the listing."""
        return not self.readable(question) and not self.shown_text(question).strip()

    def prompt_text(self, question: Question) -> str:
        pictures = len(self.readable(question))
        return prompt(
            question, pictures=pictures, text=self.shown_text(question), reasoning=self.spec.reasoning
        )

    def prompt(self, question: Question) -> Prompt:
        """A question as the model reads it."""
        ids = self.tokenizer(self.prompt_text(question), add_special_tokens=False)["input_ids"]
        return Prompt(self.with_vectors(ids), self.readable(question))

    def with_vectors(self, ids: Iterable[int]) -> list[int]:
        """Token ids in which the placeholder of a picture is repeated for each of its vectors."""
        repeated = []
        for token in ids:
            repeated += [token] * (self.vectors_per_picture if token == self.image_token else 1)
        return repeated

    def reply_ids(self, text: str) -> list[int]:
        """Token ids of a reply, with the end mark."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_token]

    def batch(self, prompts: Sequence[Prompt], replies: Sequence[Sequence[int]] | None = None) -> Batch:
        """Prompts, each with its reply if there are any. Padding lies outside, so that all replies begin together."""
        replies = replies or [[] for _ in prompts]
        longest = max(len(each.ids) for each in prompts)
        reply_tokens = max(map(len, replies))
        input_ids = torch.full((len(prompts), longest + reply_tokens), self.end_token)
        valid = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (asked, reply) in enumerate(zip(prompts, replies, strict=True)):
            begin = longest - len(asked.ids)
            end = longest + len(reply)
            input_ids[row, begin:end] = torch.tensor([*asked.ids, *reply])
            valid[row, begin:end] = True
        shown = [self._vectors[name] for asked in prompts for name in asked.pictures]
        vectors = torch.cat(shown).to(self.device) if shown else None
        positions = self.positions(input_ids, valid, pictures=len(shown))
        return Batch(
            input_ids.to(self.device), valid.to(self.device), positions.to(self.device), vectors, reply_tokens
        )

    def positions(self, input_ids: Tensor, valid: Tensor, *, pictures: int) -> Tensor:
        """(3, B, T) rotary positions. Given explicitly: left to itself the model falls back to plain ones silently."""
        side = SIDE // self.base.config.vision_config.patch_size
        grid = torch.tensor([[1, side, side]]).expand(max(pictures, 1), 3)
        kinds = (input_ids == self.image_token) & valid
        positions, _ = self.base.model.get_rope_index(
            input_ids, kinds.int(), image_grid_thw=grid, attention_mask=valid.long()
        )
        return positions

    def logits(self, batch: Batch, *, keep: int, **cache: Any) -> Tensor:
        """(B, keep, V) float32 logits of the last `keep` positions."""
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.valid.long(),
            position_ids=batch.positions,
            mm_encoder_outputs=picture_outputs(batch.pictures),
            logits_to_keep=keep,
            **cache,
        )
        return output.logits.float()

    def log_probabilities(
        self, prompts: Sequence[Prompt], replies: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of every token of the replies, (B, S) float32, and which of them exist, (B, S) bool."""
        batch = self.batch(prompts, replies)
        width = batch.reply_tokens
        # the token at position t is predicted at t - 1
        predicted = self.logits(batch, keep=width + 1)[:, :-1]
        tokens = batch.input_ids[:, -width:]
        chosen = predicted.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        exist = batch.valid[:, -width:]
        return chosen.masked_fill(~exist, 0.0), exist


def picture_outputs(vectors: Tensor | None) -> dict[str, Any] | None:
    """Vectors in the form in which the model takes what its tower would give."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if vectors is None:
        return None
    return {"image": BaseModelOutputWithPooling(pooler_output=[vectors])}


def read_square(images: Path | None, name: str, fit: str) -> Any:
    """A picture as SIDE by SIDE pixels. Raises UnreadablePicture with the reason.

    The pixel budget of the library's processor would keep the aspect, and refuse one above 200.
    """
    from PIL import Image, ImageOps

    if images is None:
        raise UnreadablePicture("missing")
    picture = open_picture(images / name, min_side=SIDE)
    if fit == "stretch":
        return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return ImageOps.pad(picture, (SIDE, SIDE), Image.Resampling.BICUBIC, color="white")


def add_lora(model: nn.Module, *, rank: int, alpha: int) -> Any:
    """The model with fresh adapters on the query and value projections of its language model; the rest is frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=TARGETS)
    return get_peft_model(model, config)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def load_base(name: str, *, precision: str, device: torch.device) -> tuple[nn.Module, Any, Any]:
    """Model, tokenizer and image processor of a hub id or folder. Raises InputError for another architecture."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    source = require_model_source(name)
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in ARCHITECTURES:
            raise InputError(
                f"model {name}: architecture {config.model_type}, expected Qwen2.5-VL or Qwen2-VL"
            )
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=choose_dtype(precision, device))
        tokenizer = AutoTokenizer.from_pretrained(source)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(source)
    except OSError as error:
        raise missing_model(name, error) from None
    return model.to(device).eval(), tokenizer, image_processor


def identify_base(name: str, model: nn.Module) -> str:
    """What stands for the base's weights in fingerprints: a hash of a folder's, the commit of a hub id's."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return weights_hash(folder)
    return f"{name}@{getattr(model.config, '_commit_hash', None)}"


def open_run(
    folder: Path, *, images: Path | None, device: torch.device, precision: str, trainable: bool = False
) -> tuple[VisionLanguage, Schema]:
    """The model and schema of a finished run. Raises InputError where the base is not the one it was trained on."""
    from peft import PeftModel

    spec = Spec.read(folder)
    base, tokenizer, image_processor = load_base(spec.model, precision=precision, device=device)
    if identify_base(spec.model, base) != spec.base:
        raise InputError(
            f"{folder}: model {spec.model} is not the one that this run was trained on; train it again"
        )
    model = PeftModel.from_pretrained(base, folder / ADAPTER, is_trainable=trainable)
    model.to(device).eval()
    return VisionLanguage(model, tokenizer, image_processor, spec, images), Schema.read(
        str(folder / SCHEMA_FILE)
    )


def save_adapter(model: Any, folder: Path) -> None:
    """Adapter weights and configuration in peft's own form."""
    model.save_pretrained(folder / ADAPTER)


def adapter_hash(folder: Path) -> str:
    """Identifies a run's adapter."""
    return sha256_file(folder / ADAPTER / "adapter_model.safetensors")[:16]


def fingerprint(*content: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
