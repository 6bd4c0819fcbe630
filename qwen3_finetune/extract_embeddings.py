"""Write the text embeddings of a finished run.

    python -m qwen3_finetune.extract_embeddings train     # data/embeddings/qwen_text_train.pkl
    python -m qwen3_finetune.extract_embeddings test      # data/embeddings/qwen_text_test.pkl
    torchrun --nproc_per_node=4 -m qwen3_finetune.extract_embeddings train

A row is the pooled embedding and the three standardised structural features: 1024 + 3 for Qwen3-Embedding-0.6B. Of an
out-of-fold run (--folds) the encoder's own log price stands between them. An interrupted extraction goes on with its
first missing shard.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from contracts.embeddings import is_current, iterate_embeddings
from contracts.errors import run_entry_point
from contracts.files import atomic_write, sha256_file
from contracts.splits import fitted_on, fitted_out_of_fold, split_hash
from contracts.workspace import SPLITS, STRUCTURAL_FEATURES, Workspace
from qwen3_finetune.config import ExtractSettings, QwenSettings
from qwen3_finetune.data import TextRows, predictions_table, read_rows
from qwen3_finetune.finished import finished_folder, is_out_of_fold, open_run
from training.extraction import ShardedExtraction
from training.run_folder import RunFolder
from training.settings import parse_settings


def main(argv: Sequence[str] | None = None) -> None:
    settings, split = parse_settings(
        ExtractSettings, argv, description=__doc__.split("\n")[0], positional={"split": SPLITS}
    )
    workspace = Workspace(settings.workspace)
    rows, path = read_rows(workspace, split), workspace.path("embeddings", name=settings.name, split=split)
    run = finished_folder(workspace, settings.run)
    meta = describe(settings, run, workspace, split)
    if is_current(path, meta):
        print(f"{path}: made before from the same rows and weights")
        return
    finished = open_run(settings, align=settings.align)
    extraction = ShardedExtraction(path, rows.sample_ids, meta, settings.shard_rows)
    for shard in extraction.pending():
        features, _ = finished.encode(rows, shard)
        features[~rows.valid[shard]] = 0
        extraction.write(shard, features, rows.valid[shard])
    if extraction.wait():
        extraction.finish(settings.keep_shards)
        print(f"{path}: {len(rows)} rows, {(~rows.valid).sum()} without text, width {finished.width}")
        if is_out_of_fold(run):
            write_predictions(workspace, settings.run, split, rows, path)


def write_predictions(workspace: Workspace, run: str, split: str, rows: TextRows, path: Path) -> None:
    """predictions/<run>_<split>.csv from the column that an out-of-fold file has, as qwen3_finetune.predict would."""
    log_price = [part.embeddings[:, -1 - len(STRUCTURAL_FEATURES)] for part in iterate_embeddings(path)]
    with atomic_write(workspace.path("predictions", name=run, split=split)) as file:
        predictions_table(rows, np.concatenate(log_price)).to_csv(file, index=False)


def describe(settings: ExtractSettings, run: RunFolder, workspace: Workspace, split: str) -> dict:
    """The meta of the embedding file."""
    from qwen3_finetune.model import checkpoint_hash

    trained, out_of_fold = run.settings(QwenSettings), is_out_of_fold(run)
    seen = () if trained.train == "head" else trained.roles.fitted_on
    return {
        "name": settings.name,
        "split": split,
        "model": trained.model + (" (random weights)" if trained.random_weights else ""),
        "run": settings.run,
        "checkpoint": checkpoint_hash(run.path),
        "trained": trained.train,
        "pooling": trained.pooling,
        "last_columns": ["log_price", *STRUCTURAL_FEATURES] if out_of_fold else list(STRUCTURAL_FEATURES),
        "aligned": out_of_fold and settings.align,
        "fitted_on": fitted_out_of_fold(trained.folds) if out_of_fold else fitted_on(encoder_folds=seen),
        "split_hash": split_hash(workspace.folds()),
        "prepared": sha256_file(workspace.path("prepared", split=split))[:16],
        "command": " ".join(sys.argv),
    }


if __name__ == "__main__":
    run_entry_point(main)
