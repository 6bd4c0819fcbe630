"""Text embeddings: our token-budget batches beside sentence-transformers and beside padding to the maximum.

    python -m studies.benchmarks.text_extraction --model FOLDER_OF_ALL_MINILM_L6_V2
    python -m studies.benchmarks.text_extraction --device cuda --model Qwen/Qwen3-Embedding-0.6B --random-weights \\
        --tokenizer ../shared/data/tokenizers/qwen2 --texts 4096 --tokens-per-batch 16384 65536

All rivals start from the same strings, so tokenisation counts. Tokens are those of the texts, never padding; the share
of the matrix-product rate is of the arithmetic that those tokens need. A text over --max-length loses its middle here
and its end in sentence-transformers, so that cosine is taken over the texts that fit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from contracts.errors import InputError, run_entry_point
from contracts.workspace import REPOSITORY
from training.device import choose_device, choose_dtype, guard_torchvision
from training.settings import parse_settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qwen3_finetune.config import QwenSettings
    from qwen3_finetune.data import TextInputs, Tokenize
    from qwen3_finetune.model import PriceModel


@dataclass
class TextExtractionSettings:
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """text encoder: hub id or local folder"""
    tokenizer: str = ""
    """empty: the model's own, or with --random-weights one trained on the texts"""
    random_weights: bool = False
    """build the architecture without its pretrained weights"""
    data: str = "../shared/data/challenge"
    """folder with a train.csv to sample; where absent, texts are generated"""
    texts: int = 384
    """how many"""
    max_length: int = 512
    """tokens of a text"""
    tokens_per_batch: tuple[int, ...] = (2048, 1024)
    """our budgets to try: padded tokens a batch"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to compute"""
    rounds: int = 3
    """times that every rival is measured, in turns"""
    quick: bool = False
    """48 texts, two budgets, one round: does it run?"""
    out: str = str(REPOSITORY / "studies" / "results" / "text_extraction.json")
    """json file to write"""

    def __post_init__(self) -> None:
        if self.quick:
            self.texts, self.rounds, self.tokens_per_batch = 48, 1, self.tokens_per_batch[:2]


def catalogue_texts(data: str, count: int, seed: int = 0) -> list[str]:
    """`count` texts drawn from data/train.csv, or generated ones when there is no such file."""
    from contracts.catalog import read_table
    from data.sample_catalog import draw_products

    path = Path(data) / "train.csv"
    table = read_table(path) if path.is_file() else draw_products(max(20, count), 20, seed)
    if len(table) < count:
        raise InputError(f"--texts {count}: {path} has only {len(table)} rows")
    return table["catalog_content"].sample(count, random_state=seed).tolist()


def linear_weights(encoder: nn.Module) -> int:
    """Weights of the linear layers, adapters excepted; 4-bit layers count what they stand for."""
    from torch import nn

    layers = [
        module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    ]
    return sum(layer.in_features * layer.out_features for layer in layers)


def attention_flops(config, lengths: np.ndarray, causal: bool) -> float:
    """FLOP of the two products with the T × T scores, in all layers, for texts of these lengths."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    whole = 4 * config.num_hidden_layers * config.num_attention_heads * head * float((lengths**2).sum())
    return whole / 2 if causal else whole


def qwen_settings(settings: TextExtractionSettings, device: torch.device) -> QwenSettings:
    from qwen3_finetune.config import QwenSettings
    from qwen3_finetune.encoder import resolve

    stage = QwenSettings(
        model=settings.model, tokenizer=settings.tokenizer, random_weights=settings.random_weights,
        max_length=settings.max_length, train="head", quantization="none", gradient_checkpointing=False,
    )  # fmt: skip
    return resolve(stage, device)


def append_end_token(tokenizer) -> None:
    """Make `tokenizer` end each text with its end token by itself, as Qwen3-Embedding's does and our stage does."""
    from tokenizers.processors import TemplateProcessing

    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )


def ours(
    model: PriceModel, tokenize: Tokenize, texts: list[str], budget: int, dtype: torch.dtype
) -> tuple[np.ndarray, TextInputs]:
    """Embeddings (N, D_in) by the stage's own extraction path, and the tokens it read."""
    from qwen3_finetune.data import TextInputs
    from qwen3_finetune.model import N_STRUCTURAL, encode

    inputs = TextInputs(
        tokenize, texts, np.zeros((len(texts), N_STRUCTURAL), np.float32), padding_side=model.padding_side
    )
    found = np.empty((len(texts), model.width), np.float32)
    for rows, features, _ in encode(model, inputs, inputs.batches(np.arange(len(texts)), budget), dtype):
        found[rows] = features
    return found[:, :-N_STRUCTURAL], inputs


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of padding in the tokens of these batches of row numbers."""
    return 1 - lengths.sum() / sum(len(rows) * int(lengths[rows].max()) for rows in batches)


def padded_to_max(
    model: PriceModel, tokenize: Tokenize, texts: list[str], dtype: torch.dtype, batch_size: int = 32
) -> np.ndarray:
    """Embeddings (N, D_in) of batches in file order, every text padded to the tokenizer's maximum."""
    import torch

    from qwen3_finetune.data import TextInputs
    from qwen3_finetune.model import pool

    inputs = TextInputs(
        tokenize, texts, np.zeros((len(texts), 3), np.float32), padding_side=model.padding_side
    )
    device, found = model.head.norm.weight.device, []
    for start in range(0, len(texts), batch_size):
        text = inputs(np.arange(start, min(start + batch_size, len(texts))))[:2]
        wide = (0, tokenize.max_length - text[0].shape[1])
        wide = wide[::-1] if model.padding_side == "left" else wide
        input_ids, mask = (torch.nn.functional.pad(tensor, wide).to(device) for tensor in text)
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = model.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        found.append(pool(hidden, mask, model.pooling).cpu().numpy())
    return np.concatenate(found)


def sentence_transformer(
    model: PriceModel, tokenizer, settings: TextExtractionSettings, device: torch.device, dtype: torch.dtype
):
    """The same weights as a SentenceTransformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        model.encoder.save_pretrained(folder)
        tokenizer.padding_side = model.padding_side
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, model_kwargs={"dtype": dtype}, max_seq_length=settings.max_length)
    pooling = Pooling(model.width - 3, "lasttoken" if model.pooling == "last" else model.pooling)
    return SentenceTransformer(modules=[transformer, pooling], device=str(device))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) of two (N, D)"""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(TextExtractionSettings, argv, description=__doc__.split("\n")[0])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    guard_torchvision()
    from transformers.utils import logging

    from qwen3_finetune.data import Tokenize, train_tokenizer
    from qwen3_finetune.encoder import architecture, load_tokenizer
    from qwen3_finetune.model import build_model
    from studies.benchmarks.measure import gemm_rate, interleave, report

    logging.set_verbosity_error()  # transformers lists the pooler that sentence-transformers does not use either
    device = choose_device(settings.device)
    dtype, stage = choose_dtype("auto", device), qwen_settings(settings, device)
    texts = catalogue_texts(settings.data, settings.texts)
    if settings.tokenizer or not settings.random_weights:
        tokenizer = load_tokenizer(settings.tokenizer or settings.model)
    else:
        tokenizer = train_tokenizer(texts, architecture(stage).vocab_size)
    if stage.pooling == "last" and tokenizer("price")["input_ids"][-1] != tokenizer.eos_token_id:
        append_end_token(tokenizer)
    model, tokenize = build_model(stage, device, len(tokenizer)).eval(), Tokenize.of(tokenizer, stage)
    library = sentence_transformer(model, tokenizer, settings, device, dtype)

    rivals: dict[str, Callable[[], object]] = {
        f"ours, {budget} tokens a batch": lambda budget=budget: ours(model, tokenize, texts, budget, dtype)
        for budget in settings.tokens_per_batch
    }
    rivals["sentence-transformers"] = lambda: library.encode(texts, show_progress_bar=False)
    rivals[f"padded to {settings.max_length}"] = lambda: padded_to_max(model, tokenize, texts, dtype)
    seconds = interleave(rivals, rounds=settings.rounds)
    rate = gemm_rate(settings.device, dtype)

    embeddings, inputs = ours(model, tokenize, texts, settings.tokens_per_batch[0], dtype)
    lengths, everything = inputs.lengths, np.arange(len(texts))
    uncut = lengths < settings.max_length
    to_library = cosine(embeddings, rivals["sentence-transformers"]())[uncut]
    to_padded = cosine(embeddings, padded_to_max(model, tokenize, texts, dtype))
    tokens = int(lengths.sum())
    flops = 2 * linear_weights(model.encoder) * tokens
    flops += attention_flops(model.encoder.config, lengths, causal=model.padding_side == "left")
    rows = []
    for name, time in seconds.items():
        per_second = 1 / time["median"]
        row = {
            "rival": name,
            "texts": len(texts),
            "seconds": time["median"],
            "texts_per_second": len(texts) * per_second,
            "tokens_per_second": tokens * per_second,
            "gemm_share": flops * per_second / rate,
        }
        if name.startswith("ours"):
            budget = int(name.split()[1])
            row["padding_share"] = padding_share(lengths, inputs.batches(everything, budget))
            for other in list(seconds)[-2:]:
                row[f"times_{other.replace(' ', '_')}"] = seconds[other]["median"] / time["median"]
        rows.append(row)
    rows.append({
        "agreement": settings.model, "cosine_min_to_padded": float(to_padded.min()), "uncut_texts": int(uncut.sum()),
        "cosine_min_to_sentence_transformers": float(to_library.min()),
    })  # fmt: skip
    report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
