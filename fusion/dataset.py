"""A table of products as tensors: every embedding joined by sample_id, with a mask of what is there.

All embeddings lie side by side in one matrix on the training device. A step picks its rows with one
index_select, and nothing is collated or sent while training runs.

Legend: N catalogue rows, M modalities, D_in encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from contracts import splits
from contracts.embeddings import Embeddings, align, read_embeddings
from contracts.errors import InputError
from contracts.files import read_json, sidecar_of
from contracts.workspace import Workspace


@dataclass
class FusionTable:
    rows: pd.DataFrame
    """the prepared table, N rows; in train with the column `fold`"""
    matrix: Tensor
    """(N, ΣD_in) float32, the embeddings side by side; zero where not valid"""
    widths: dict[str, int]
    """D_in of each modality, in the order of the matrix"""
    valid: Tensor
    """(N, M) bool, in the same order"""
    meta: dict[str, dict] = field(default_factory=dict)
    """meta of each embedding file that was read"""

    @classmethod
    def of(
        cls,
        rows: pd.DataFrame,
        embeddings: dict[str, Tensor],
        valid: Tensor,
        meta: dict[str, dict] | None = None,
    ) -> FusionTable:
        """From one (N, D_in) matrix per modality."""
        widths = {name: embedding.shape[1] for name, embedding in embeddings.items()}
        matrix = torch.cat(list(embeddings.values()), dim=1)
        return cls(rows, matrix, widths, valid, meta or {})

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """(N, D_in) per modality: columns of the matrix, not copies."""
        return self._by_modality(self.matrix)

    def _by_modality(self, matrix: Tensor) -> dict[str, Tensor]:
        columns = matrix.split(list(self.widths.values()), dim=1)
        return dict(zip(self.widths, columns, strict=True))

    @property
    def log_price(self) -> Tensor:
        """(N,) log1p of dollars"""
        return torch.from_numpy(np.log1p(self.rows["price"].to_numpy(np.float32)))

    def rows_in(self, folds: tuple[int, ...]) -> Tensor:
        """Positions of the rows that belong to `folds`, (n,) int64."""
        return torch.from_numpy(np.flatnonzero(self.rows["fold"].isin(folds)))

    def coverage(self) -> str:
        """How many rows have each embedding, for people."""
        counts = zip(self.widths, self.valid.sum(0).tolist(), strict=True)
        return f"{len(self.rows)} rows: " + ", ".join(f"{name} {count}" for name, count in counts)

    def take(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Embeddings (n, D_in) per modality and mask (n, M) of the rows at the positions `index` (n,)."""
        return self._by_modality(self.matrix.index_select(0, index)), self.valid.index_select(0, index)

    def to(self, device: torch.device) -> FusionTable:
        return replace(self, matrix=self.matrix.to(device), valid=self.valid.to(device))


def load_table(
    workspace: Workspace,
    split: str,
    modalities: tuple[str, ...],
    use: tuple[str, ...] = (),
    trained_widths: dict[str, int] | None = None,
) -> FusionTable:
    """Read the prepared table and its embeddings.

    Args:
        modalities: the model's inputs, in its order.
        use: those to read; empty means all. An embedding that is left out needs no file: its rows are
            invalid. Where its file exists, the width is kept, so that parameter counts compare.
        trained_widths: what a trained model expects of those that are left out.

    Raises:
        InputError: an unknown name in `use`, or a file that is missing, damaged, of other rows or made with
            another fold file.
    """
    if unknown := set(use) - set(modalities):
        raise InputError(f"--use {', '.join(sorted(unknown))}: choose from {', '.join(modalities)}")
    rows = workspace.training_table() if split == "train" else workspace.prepared(split)
    split_hash = splits.split_hash(workspace.folds())
    ids = rows["sample_id"].to_numpy()
    embeddings: dict[str, Tensor] = {}
    valid: list[Tensor] = []
    metas: dict[str, dict] = {}
    for name in modalities:
        path = workspace.path("embeddings", name=name, split=split)
        if use and name not in use:
            width = trained_widths[name] if trained_widths else _recorded_width(path)
            embeddings[name] = torch.zeros(len(rows), width)
            valid.append(torch.zeros(len(rows), dtype=torch.bool))
            continue
        content = read_embeddings(path)
        _check_split(path, content, split_hash)
        aligned = align(content, ids, path)
        embeddings[name] = torch.from_numpy(aligned.embeddings)
        valid.append(torch.from_numpy(aligned.valid))
        metas[name] = content.meta
    return FusionTable.of(rows, embeddings, torch.stack(valid, dim=1), metas)


def _recorded_width(path: Path) -> int:
    """Width of an embedding that is not used. The model has a branch for it that never sees anything."""
    if sidecar_of(path).is_file():
        return read_json(sidecar_of(path))["width"]
    return 8  # any width into which the three structural fields fit


def _check_split(path: Path, content: Embeddings, split_hash: str) -> None:
    if content.meta["split_hash"] != split_hash:
        raise InputError(
            f"{path}: made with another fold file than data/folds.csv; run the stage that writes it again"
        )


def check_no_leak(table: FusionTable, validate: tuple[int, ...], *, allow: bool) -> bool:
    """Whether a score on the `validate` folds would be leaked: an encoder was fitted on their rows.

    Raises InputError in that case unless `allow`.
    """
    leaks: dict[str, list[int]] = {}
    for name, meta in table.meta.items():
        if folds := splits.leaked_folds(meta["fitted_on"], validate):
            leaks[name] = folds
    if leaks and not allow:
        listed = ", ".join(f"{name} (folds {folds})" for name, folds in leaks.items())
        raise InputError(
            f"no honest validation score: the encoder of {listed} was fitted on rows it would be scored on; "
            "use the --holdout that the encoder was trained with, or --allow-leak for a number called leaked"
        )
    return bool(leaks)
