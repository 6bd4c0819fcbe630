"""A table of products as tensors: every embedding joined by sample_id, with a mask of what is there.

All embeddings lie side by side in one matrix on the training device: a step picks its rows with one index_select, and
nothing is collated or sent while training runs.

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
from contracts.files import read_json
from contracts.workspace import Workspace


@dataclass
class FusionTable:
    rows: pd.DataFrame
    """the prepared table, N rows; `fold` joined in train"""
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
        """From one (N, D_in) matrix a modality."""
        widths = {name: embedding.shape[1] for name, embedding in embeddings.items()}
        return cls(rows, torch.cat(list(embeddings.values()), dim=1), widths, valid, meta or {})

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """(N, D_in) a modality: columns of the matrix, not copies."""
        return self._by_modality(self.matrix)

    def _by_modality(self, matrix: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.widths, matrix.split(list(self.widths.values()), dim=1), strict=True))

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
        """Embeddings and mask of some rows."""
        return self._by_modality(self.matrix.index_select(0, index)), self.valid.index_select(0, index)

    def to(self, device: torch.device) -> FusionTable:
        return replace(self, matrix=self.matrix.to(device), valid=self.valid.to(device))


def embedding_files(workspace: Workspace, split: str, names: tuple[str, ...]) -> list[Path]:
    return [workspace.path("embeddings", name=name, split=split) for name in names]


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
        use: those to read; empty means all. One that is left out needs no file: its rows are invalid, and
            where the file exists its width is kept, so that parameter counts compare.
        trained_widths: what a trained model expects of those that are left out.

    Raises:
        InputError: an unknown name in `use`, a missing or damaged file, a file of other rows or another split.
    """
    if unknown := set(use) - set(modalities):
        raise InputError(f"--use {', '.join(sorted(unknown))}: choose from {', '.join(modalities)}")
    rows = workspace.prepared(split)
    folds = workspace.folds()
    if split == "train":
        rows["fold"] = folds.reindex(rows["sample_id"]).to_numpy()
        if rows["fold"].isna().any():
            raise InputError(
                f"{workspace.path('folds')}: no fold for sample_id {rows['sample_id'][rows['fold'].isna()].iloc[0]}"
            )
    ids = rows["sample_id"].to_numpy()
    embeddings, valid, metas = {}, [], {}
    for name in modalities:
        path = workspace.path("embeddings", name=name, split=split)
        if use and name not in use:
            width = trained_widths[name] if trained_widths else _recorded_width(path)
            embeddings[name], is_valid = torch.zeros(len(rows), width), np.zeros(len(rows), bool)
        else:
            content = read_embeddings(path)
            _check_split(path, content, folds)
            aligned = align(content, ids, path)
            embeddings[name], is_valid = torch.from_numpy(aligned.embeddings), aligned.valid
            metas[name] = content.meta
        valid.append(torch.from_numpy(is_valid))
    return FusionTable.of(rows, embeddings, torch.stack(valid, dim=1), metas)


def _recorded_width(path: Path) -> int:
    sidecar = path.with_name(path.name + ".json")
    # the branch must exist, even if it never sees anything; 8 leaves room for the structural fields
    return read_json(sidecar)["width"] if sidecar.is_file() else 8


def _check_split(path: Path, content: Embeddings, folds: pd.Series) -> None:
    if content.meta["split_hash"] != splits.split_hash(folds):
        raise InputError(
            f"{path}: made with another fold file than data/folds.csv; run the stage that writes it again"
        )


def check_no_leak(table: FusionTable, validate: tuple[int, ...], *, allow: bool) -> bool:
    """Whether a score on the `validate` folds would be leaked: an encoder was fitted on their rows.

    Raises InputError in that case unless `allow`.
    """
    leaks = {name: splits.leaked_folds(meta["fitted_on"], validate) for name, meta in table.meta.items()}
    leaks = {name: folds for name, folds in leaks.items() if folds}
    if leaks and not allow:
        listed = ", ".join(f"{name} (folds {folds})" for name, folds in leaks.items())
        raise InputError(
            f"no honest validation score: the encoder of {listed} was fitted on rows it would be scored on; "
            "use the --holdout that the encoder was trained with, or --allow-leak to get a number called leaked"
        )
    return bool(leaks)
