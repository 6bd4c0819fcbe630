"""Text embeddings: our token-budget batches beside sentence-transformers and beside padding to the maximum.

    python -m studies.benchmarks.text_extraction --model FOLDER_OF_ALL_MINILM_L6_V2
    python -m studies.benchmarks.text_extraction --device cuda --model Qwen/Qwen3-Embedding-0.6B --random-weights \\
        --tokenizer ../shared/data/tokenizers/qwen2 --texts 4096 --tokens-per-batch 16384 65536

All rivals start from the same strings, so tokenisation counts. Tokens are those of the texts, never padding, and the
share of the matrix-product rate is that of the arithmetic which these tokens need. A text over --max-length loses its
middle here and its end in sentence-transformers, so the cosine between the two is taken over the texts that fit.

Legend: N texts, T tokens, D_in encoder width.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from contracts.errors import InputError, run_entry_point
from studies.tables import RESULTS
from training.device import choose_device, guard_torchvision
from training.settings import parse_settings

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from qwen3_finetune.config import QwenSettings
    from qwen3_finetune.data import TextInputs, Tokenize
    from qwen3_finetune.model import PriceModel
    from qwen3_finetune.spec import EncoderSpec

PADDED_BATCH = 32
"""Texts per batch where all are padded to the maximum."""


@dataclass
class TextExtractionSettings:
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Text encoder: hub id or local folder."""
    tokenizer: str = ""
    """Tokenizer; empty means the model's own, or with --random-weights one that is trained on the texts."""
    random_weights: bool = False
    """Build the architecture without its pretrained weights."""
    data: str = "../shared/data/challenge"
    """Folder with a train.csv to sample; where it is absent, texts are generated."""
    texts: int = 384
    """How many texts to embed."""
    max_length: int = 512
    """Tokens per text."""
    tokens_per_batch: tuple[int, ...] = (2048, 1024)
    """Our budgets to try: padded tokens per batch."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    rounds: int = 3
    """Times that every rival is measured, in turns."""
    quick: bool = False
    """Use 48 texts, two budgets and one round, to see that it runs."""
    out: Path = RESULTS / "text_extraction.json"
    """Json file to write."""

    def __post_init__(self) -> None:
        if self.quick:
            self.texts = 48
            self.rounds = 1
            self.tokens_per_batch = self.tokens_per_batch[:2]


def catalogue_texts(data: str, count: int, seed: int = 0) -> list[str]:
    """`count` texts drawn from data/train.csv, or generated ones when there is no such file."""
    from contracts.catalog import read_table
    from data.sample_catalog import FEWEST_ROWS, draw_products

    path = Path(data) / "train.csv"
    to_draw = max(FEWEST_ROWS, count)
    table = read_table(path) if path.is_file() else draw_products(to_draw, FEWEST_ROWS, seed)
    if len(table) < count:
        raise InputError(f"--texts {count}: {path} has only {len(table)} rows")
    return table["catalog_content"].sample(count, random_state=seed).tolist()


def linear_weights(encoder: nn.Module) -> int:
    """Weights of the linear layers, without adapters; a 4-bit layer counts the weights that it stands for."""
    from torch import nn

    total = 0
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            total += module.in_features * module.out_features
    return total


def attention_flop(config: PretrainedConfig, lengths: np.ndarray, causal: bool) -> float:
    """FLOP of the two products with the T × T scores, over all layers, for texts of these lengths (N,)."""
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_width
    flop = 4 * config.num_hidden_layers * width * float((lengths**2).sum())
    return flop / 2 if causal else flop


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of padding in the tokens of these batches of row numbers; lengths (N,) are those of all rows."""
    padded = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    return 1 - lengths.sum() / padded


def stage_settings(settings: TextExtractionSettings) -> QwenSettings:
    """The stage's settings for a frozen encoder in full precision."""
    from qwen3_finetune.config import QwenSettings

    return QwenSettings(
        model=settings.model,
        tokenizer=settings.tokenizer,
        random_weights=settings.random_weights,
        max_length=settings.max_length,
        train="head",
        quantization="none",
        gradient_checkpointing=False,
    )


def load_tokenizer_of(
    settings: TextExtractionSettings, spec: EncoderSpec, texts: list[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer that all rivals share. It appends an end token by itself where the pooling needs one."""
    from qwen3_finetune.backbone import load_tokenizer
    from qwen3_finetune.data import train_tokenizer

    source = spec.tokenizer
    tokenizer = load_tokenizer(source) if source else train_tokenizer(texts, spec.config.vocab_size)
    if spec.pooling == "last" and tokenizer("price")["input_ids"][-1] != tokenizer.eos_token_id:
        append_end_token(tokenizer)
    return tokenizer


def append_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `tokenizer` end each text with its end token by itself, as Qwen3-Embedding's does and our stage does."""
    from tokenizers.processors import TemplateProcessing

    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )


class OurEncoder:
    """The stage's own model and tokenisation."""

    def __init__(self, model: PriceModel, tokenize: Tokenize, dtype: torch.dtype):
        self.model = model
        self.tokenize = tokenize
        self.dtype = dtype

    def inputs(self, texts: list[str]) -> TextInputs:
        """The tokens of the texts, without structural features: these do not change the embedding."""
        from qwen3_finetune.data import N_STRUCTURAL, TextInputs

        no_features = np.zeros((len(texts), N_STRUCTURAL), np.float32)
        return TextInputs(self.tokenize, texts, no_features, padding_side=self.model.padding_side)

    def embed(self, texts: list[str], tokens_per_batch: int) -> np.ndarray:
        """Embeddings (N, D_in) by the stage's own extraction path."""
        from qwen3_finetune.data import N_STRUCTURAL
        from qwen3_finetune.model import encode

        inputs = self.inputs(texts)
        batches = inputs.batches(np.arange(len(texts)), tokens_per_batch)
        found = np.empty((len(texts), self.model.width), np.float32)
        for rows, features, _ in encode(self.model, inputs, batches, self.dtype):
            found[rows] = features
        return found[:, :-N_STRUCTURAL]

    def embed_padded_to_max(self, texts: list[str]) -> np.ndarray:
        """Embeddings (N, D_in) of batches in file order, with every text padded to the longest that is allowed."""
        import torch

        from qwen3_finetune.model import pool

        model = self.model
        inputs = self.inputs(texts)
        device = model.head.norm.weight.device
        found = []
        for start in range(0, len(texts), PADDED_BATCH):
            rows = np.arange(start, min(start + PADDED_BATCH, len(texts)))
            input_ids, mask, _ = inputs(rows)
            missing = self.tokenize.max_length - input_ids.shape[1]
            sides = (missing, 0) if model.padding_side == "left" else (0, missing)
            input_ids = torch.nn.functional.pad(input_ids, sides).to(device)
            mask = torch.nn.functional.pad(mask, sides).to(device)
            autocast = torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
            with torch.no_grad(), autocast:
                hidden = model.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
            found.append(pool(hidden, mask, model.pooling).cpu().numpy())
        return np.concatenate(found)


def sentence_transformer(
    model: PriceModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EncoderSpec,
    device: torch.device,
) -> SentenceTransformer:
    """The same weights as a SentenceTransformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    encoder: Any = model.encoder
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        tokenizer.padding_side = model.padding_side
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, model_kwargs={"dtype": spec.dtype}, max_seq_length=spec.max_length)
    mode = "lasttoken" if spec.pooling == "last" else spec.pooling
    pooling = Pooling(spec.config.hidden_size, mode)
    return SentenceTransformer(modules=[transformer, pooling], device=str(device))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a with the same row of b: (N, D) and (N, D) to (N,)."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / lengths


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(TextExtractionSettings, argv, description=__doc__.split("\n")[0])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    guard_torchvision()
    from transformers.utils import logging

    from qwen3_finetune.data import Tokenize
    from qwen3_finetune.model import build_model
    from qwen3_finetune.spec import EncoderSpec
    from studies.benchmarks.measure import gemm_rate, interleave, report

    logging.set_verbosity_error()  # transformers lists the pooler, which sentence-transformers does not use either
    device = choose_device(settings.device)
    stage = stage_settings(settings)
    spec = EncoderSpec.resolve(stage, device)
    texts = catalogue_texts(settings.data, settings.texts)
    tokenizer = load_tokenizer_of(settings, spec, texts)
    model = build_model(spec, device, len(tokenizer), head_hidden=stage.head_hidden).eval()
    ours = OurEncoder(model, Tokenize.of(tokenizer, spec), spec.dtype)
    library = sentence_transformer(model, tokenizer, spec, device)

    budget_of = {f"ours, {budget} tokens per batch": budget for budget in settings.tokens_per_batch}
    rivals: dict[str, Callable[[], np.ndarray]] = {}
    for name, budget in budget_of.items():
        rivals[name] = functools.partial(ours.embed, texts, budget)
    with_library = functools.partial(library.encode, texts, show_progress_bar=False)
    padded_to_max = functools.partial(ours.embed_padded_to_max, texts)
    others: dict[str, Callable[[], np.ndarray]] = {
        "sentence-transformers": with_library,
        f"padded to {settings.max_length}": padded_to_max,
    }
    times = interleave(rivals | others, rounds=settings.rounds)

    inputs = ours.inputs(texts)
    lengths = inputs.lengths
    tokens = int(lengths.sum())
    flop = 2.0 * linear_weights(model.encoder) * tokens
    flop += attention_flop(spec.config, lengths, causal=model.padding_side == "left")
    rate = gemm_rate(settings.device, spec.dtype)
    rows = []
    for name, seconds in times.items():
        per_second = 1 / seconds["median"]
        row = {
            "rival": name,
            "texts": len(texts),
            "seconds": seconds["median"],
            "texts_per_second": len(texts) * per_second,
            "tokens_per_second": tokens * per_second,
            "gemm_share": flop * per_second / rate,
        }
        if name in budget_of:
            batches = inputs.batches(np.arange(len(texts)), budget_of[name])
            row["padding_share"] = padding_share(lengths, batches)
            for other in others:
                row[f"times_{other.replace(' ', '_')}"] = times[other]["median"] / seconds["median"]
        rows.append(row)

    embeddings = ours.embed(texts, settings.tokens_per_batch[0])
    uncut = lengths < settings.max_length
    rows.append(
        {
            "agreement": settings.model,
            "uncut_texts": int(uncut.sum()),
            "cosine_min_to_padded": float(cosine(embeddings, padded_to_max()).min()),
            "cosine_min_to_sentence_transformers": float(cosine(embeddings, with_library())[uncut].min()),
        }
    )
    report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
