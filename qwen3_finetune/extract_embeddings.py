"""Write the text embeddings of a finished run.

    python -m qwen3_finetune.extract_embeddings train     # data/embeddings/qwen_text_train.pkl
    python -m qwen3_finetune.extract_embeddings test      # data/embeddings/qwen_text_test.pkl
    python -m qwen3_finetune.extract_embeddings new       # any further table that data.prepare has made
    torchrun --nproc_per_node=4 -m qwen3_finetune.extract_embeddings train

A row holds the pooled embedding and the three standardised structural features: 1024 + 3 columns for
Qwen3-Embedding-0.6B. For an out-of-fold run (--folds), the log price that the encoder predicts stands between them, and
the prediction file is written as well. An interrupted extraction continues with the shards that are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contracts.embeddings import is_current, iterate_embeddings
from contracts.errors import run_entry_point
from contracts.files import sha256_file
from contracts.splits import split_hash
from contracts.workspace import Workspace
from qwen3_finetune.config import ExtractSettings
from qwen3_finetune.data import N_STRUCTURAL, read_rows
from qwen3_finetune.encoder import EMPTY_TEXT, Encoder, encoder_meta
from qwen3_finetune.finished import finished_folder
from qwen3_finetune.predict import write_prices
from training.extraction import ShardedExtraction
from training.run_folder import RunFolder
from training.settings import parse_settings


def extract(settings: ExtractSettings, split: str) -> None:
    """Embed one table. Under torchrun the processes share the shards, and the first one joins them."""
    workspace = Workspace(settings.workspace)
    run = finished_folder(workspace, settings.run)
    rows = read_rows(workspace, split)
    path = workspace.path("embeddings", name=settings.embedding, split=split)
    meta = embedding_meta(settings, run, workspace, split)
    if is_current(path, meta):
        print(f"{path}: up to date, made from the same rows and weights")
        return

    encoder = Encoder.open(
        run.path,
        name=settings.embedding,
        device=settings.device,
        precision=settings.precision,
        tokens_per_batch=settings.tokens_per_batch,
        align=settings.align,
    )
    extraction = ShardedExtraction(path, rows.sample_ids, meta, settings.shard_rows)
    for shard in extraction.pending():
        features, _ = encoder.encode_rows(rows, shard)
        valid = rows.valid[shard]
        extraction.write(shard, features, valid, np.where(valid, "", EMPTY_TEXT).tolist())
    if not extraction.wait():
        return
    extraction.finish(settings.keep_shards)
    without_text = ~rows.valid
    print(f"{path}: {len(rows)} rows, {without_text.sum()} without text, width {encoder.width}")
    if run.is_out_of_fold:
        log_price = log_price_column(path)
        # a row without a text has no embedding, but a price like any other
        if without_text.any():
            _, log_price[without_text] = encoder.encode_rows(rows, np.flatnonzero(without_text))
        write_prices(workspace, settings.run, split, rows, log_price)


def embedding_meta(
    settings: ExtractSettings, run: RunFolder, workspace: Workspace, split: str
) -> dict[str, Any]:
    """Meta of the embedding file. A shard written under another meta (apart from `command`) is made again."""
    return {
        **encoder_meta(run, name=settings.embedding, align=settings.align),
        "split": split,
        "split_hash": split_hash(workspace.folds()),
        "prepared": sha256_file(workspace.path("prepared", split=split))[:16],
        "command": " ".join(sys.argv),
    }


def log_price_column(path: Path) -> np.ndarray:
    """(N,) the log price that the embedding file of an out-of-fold run holds."""
    column = -1 - N_STRUCTURAL
    return np.concatenate([part.embeddings[:, column] for part in iterate_embeddings(path)])


def main(argv: Sequence[str] | None = None) -> None:
    settings, split = parse_settings(
        ExtractSettings, argv, description=__doc__.split("\n")[0], positional={"table": None}
    )
    extract(settings, split)


if __name__ == "__main__":
    run_entry_point(main)
