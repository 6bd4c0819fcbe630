"""Write the text embeddings of a finished run.

    python -m qwen3_finetune.extract_embeddings train     # data/embeddings/qwen_text_train.pkl
    python -m qwen3_finetune.extract_embeddings test      # data/embeddings/qwen_text_test.pkl

A row is the pooled embedding and the three standardised structural features: 1024 + 3 for Qwen3-Embedding-0.6B.
An interrupted extraction goes on with its first missing shard.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from contracts.embeddings import ShardedExtraction
from contracts.errors import run_entry_point
from contracts.settings import parse_settings
from contracts.splits import fitted_on, roles, split_hash
from contracts.workspace import SPLITS, STRUCTURAL_FEATURES, Workspace
from qwen3_finetune.config import ExtractSettings
from qwen3_finetune.data import read_rows
from qwen3_finetune.predict import FinishedRun


def main(argv: Sequence[str] | None = None) -> None:
    settings, split = parse_settings(
        ExtractSettings, argv, description=__doc__.split("\n")[0], positional={"split": SPLITS}
    )
    workspace = Workspace(settings.workspace)
    rows, finished = read_rows(workspace, split), FinishedRun(settings)
    path = workspace.path("embeddings", name=settings.name, split=split)
    extraction = ShardedExtraction(
        path, rows.sample_ids, describe(settings, finished, split), settings.shard_rows
    )
    for shard in extraction.pending():
        features, _ = finished.encode(rows, shard)
        features[~rows.valid[shard]] = 0
        extraction.write(shard, features, rows.valid[shard])
    extraction.finish(settings.keep_shards)
    print(f"{path}: {len(rows)} rows, {(~rows.valid).sum()} without text, width {finished.model.width}")


def describe(settings: ExtractSettings, finished: FinishedRun, split: str) -> dict:
    """The meta of the embedding file."""
    from qwen3_finetune.model import checkpoint_hash

    trained = finished.settings
    seen = () if trained.train == "head" else roles(trained.holdout).fitted_on
    return {
        "name": settings.name,
        "split": split,
        "model": trained.model + (" (random weights)" if trained.random_weights else ""),
        "run": settings.run,
        "checkpoint": checkpoint_hash(finished.run.path),
        "trained": trained.train,
        "pooling": trained.pooling,
        "last_columns": list(STRUCTURAL_FEATURES),
        "fitted_on": fitted_on(encoder_folds=seen),
        "split_hash": split_hash(finished.workspace.folds()),
        "command": " ".join(sys.argv),
    }


if __name__ == "__main__":
    run_entry_point(main)
