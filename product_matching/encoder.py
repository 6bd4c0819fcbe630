"""The sentence encoder: load it, embed texts with it, tell one from another. N texts, D embedding width."""

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
    require_model_source,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_encoder(name: str, *, max_length: int = 128, device: str = "auto") -> SentenceTransformer:
    """Load a sentence-transformers model from a hub id or a local folder, in float32.

    Raises InputError when the folder does not exist or holds no such model.
    """
    source = require_model_source(name)
    guard_torchvision()
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    if os.environ.get("TRANSFORMERS_VERBOSITY") is None:
        logging.disable_progress_bar()  # a bar for each of a hundred small tensors
    try:
        encoder = SentenceTransformer(source, device=str(choose_device(device)))
    except (OSError, ValueError, KeyError) as error:
        raise missing_model(name, error) from None
    encoder.max_seq_length = min(max_length, encoder.max_seq_length or max_length)
    return encoder.float()


def encode(
    encoder: SentenceTransformer, texts: list[str], *, batch_size: int = 64, progress: bool = False
) -> np.ndarray:
    """Embed texts: (N, D) float32, every row of length 1, so that a dot product is a cosine.

    Raises InputError when the encoder answers with NaN or inf: its weights are damaged.
    """
    width = encoder.get_embedding_dimension()
    if not texts:
        return np.zeros((0, width), np.float32)
    embeddings = encoder.encode(
        [text[:MAX_CHARACTERS] for text in texts],
        batch_size=batch_size, normalize_embeddings=True, show_progress_bar=progress,
    ).astype(np.float32, copy=False)  # fmt: skip
    if not np.isfinite(embeddings).all():
        raise InputError("the encoder's embeddings hold NaN or inf; its weights are damaged")
    return embeddings


def fingerprint(encoder: SentenceTransformer) -> str:
    """Identifies the weights, wherever they were loaded from: two models of one name and width differ here."""
    digest = hashlib.sha256(str(encoder.max_seq_length).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
