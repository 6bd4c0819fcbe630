"""The sentence encoder: load it, embed texts with it, identify its weights. N texts, D embedding width."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import InputError
from product_matching.config import MAX_CHARACTERS
from training.device import (
    choose_device,
    guard_torchvision,
    missing_model,
    prefer_cache_offline,
    require_model_source,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ENCODING_BATCH = 64
"""Texts per forward pass when nothing is trained. Fewer than one default training step holds with its gradients."""


def load_encoder(name: str, *, max_length: int = 128, device: str = "auto") -> SentenceTransformer:
    """Load a sentence-transformers model in float32.

    Args:
        name: hub id or local folder.
        max_length: tokens of a text that are read; a model with a lower limit keeps its own.

    Raises:
        InputError: the folder does not exist or holds no such model.
    """
    source = require_model_source(name)
    guard_torchvision()
    prefer_cache_offline(source)
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    if os.environ.get("TRANSFORMERS_VERBOSITY") is None:
        logging.disable_progress_bar()  # otherwise there is one bar per small tensor
    try:
        encoder = SentenceTransformer(source, device=str(choose_device(device)))
    except (OSError, ValueError, KeyError) as error:
        raise missing_model(name, error) from None
    encoder.max_seq_length = min(max_length, encoder.max_seq_length or max_length)
    return encoder.float()


def encode(encoder: SentenceTransformer, texts: list[str], *, progress: bool = False) -> np.ndarray:
    """Embed texts: (N, D) float32. Every row has length 1, so a dot product of two rows is their cosine.

    Raises InputError when an embedding holds NaN or inf: the encoder's weights are damaged.
    """
    if not texts:
        return np.zeros((0, encoder.get_embedding_dimension()), np.float32)
    embeddings = encoder.encode(
        [text[:MAX_CHARACTERS] for text in texts],  # the tokenizer would read all of it before cutting it
        batch_size=ENCODING_BATCH,
        normalize_embeddings=True,
        show_progress_bar=progress,
    )
    embeddings = embeddings.astype(np.float32, copy=False)
    if not np.isfinite(embeddings).all():
        raise InputError(
            "the encoder's embeddings hold NaN or inf: its weights are damaged; pass another --model"
        )
    return embeddings


def fingerprint(encoder: SentenceTransformer) -> str:
    """A hash of the weights and the text length: it tells apart two models of one name and width."""
    digest = hashlib.sha256(str(encoder.max_seq_length).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
