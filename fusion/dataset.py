"""A table of products as tensors: every embedding joined by sample_id, with a mask of what is there.

The feature columns of the table itself, if it has any, join them as one more modality, `tabular`. How they become
numbers is learnt from the rows that a model is fitted on, so they are added for each model by `with_tabular`.

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
from contracts.embeddings import Aligned, Embeddings, align, read_embeddings
from contracts.errors import InputError
from contracts.files import read_json, sidecar_of
from contracts.workspace import Workspace
from fusion.config import TABULAR
from fusion.tabular import TableColumns, feature_columns


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

    def with_tabular(self, columns: TableColumns | None) -> FusionTable:
        """The same rows with the table's own feature columns as the last modality; unchanged for None."""
        if columns is None:
            return self
        content, is_stated = columns.matrix(self.rows)
        device = self.valid.device
        tabular = torch.from_numpy(content).to(device)
        stated = torch.from_numpy(is_stated).to(device)
        valid = torch.cat([self.valid, stated[:, None]], dim=1)
        return FusionTable.of(self.rows, self.embeddings | {TABULAR: tabular}, valid, self.meta)

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
        modalities: the embeddings that are the model's inputs, in its order.
        use: what to use of them and of `tabular`; empty means all. An embedding that is left out needs no file: its
            rows are invalid. Where its file exists, the width is kept, so that parameter counts compare.
        trained_widths: what a trained model expects of those that are left out.

    Raises:
        InputError: a file that is missing, damaged, of other rows or made with another fold file.
    """
    rows = workspace.training_table() if split == "train" else workspace.prepared(split)
    split_hash = splits.split_hash(workspace.folds())
    ids = rows["sample_id"].to_numpy()
    aligned: dict[str, Aligned] = {}
    widths: dict[str, int] = {}
    metas: dict[str, dict] = {}
    for name in modalities:
        path = workspace.path("embeddings", name=name, split=split)
        if use and name not in use:
            widths[name] = trained_widths[name] if trained_widths else _recorded_width(path)
            continue
        content = read_embeddings(path)
        _check_split(path, content, split_hash)
        aligned[name] = align(content, ids, path)
        widths[name] = content.width
        metas[name] = content.meta
    return _side_by_side(rows, aligned, widths, metas)


def table_in_memory(
    rows: pd.DataFrame, embeddings: dict[str, Embeddings], widths: dict[str, int]
) -> FusionTable:
    """The table of prepared rows whose embeddings are at hand, such as those of a product that asks for its price.

    Args:
        rows: N prepared rows.
        embeddings: by name; they are joined by sample_id. This takes them over, see `contracts.embeddings.align`.
        widths: D_in of each embedding of the model, in its order; those without an entry in `embeddings` count as
            missing in every row.

    Raises:
        InputError: an embedding has none of the rows.
    """
    ids = rows["sample_id"].to_numpy(np.str_)
    aligned: dict[str, Aligned] = {}
    metas: dict[str, dict] = {}
    for name in widths:
        if name in embeddings:
            aligned[name] = align(embeddings[name], ids, f"embedding {name}")
            metas[name] = embeddings[name].meta
    return _side_by_side(rows, aligned, widths, metas)


def _side_by_side(
    rows: pd.DataFrame, aligned: dict[str, Aligned], widths: dict[str, int], metas: dict[str, dict]
) -> FusionTable:
    """The table whose embeddings are those that are there, and zeros for the others in `widths`."""
    matrices: dict[str, Tensor] = {}
    valid: list[Tensor] = []
    for name, width in widths.items():
        if name in aligned:
            matrices[name] = torch.from_numpy(aligned[name].embeddings)
            valid.append(torch.from_numpy(aligned[name].valid))
        else:
            matrices[name] = torch.zeros(len(rows), width)
            valid.append(torch.zeros(len(rows), dtype=torch.bool))
    return FusionTable.of(rows, matrices, torch.stack(valid, dim=1), metas)


def uses_tabular(rows: pd.DataFrame, use: tuple[str, ...]) -> bool:
    """Whether a model that can read the feature columns of the table does so: if there are any and `use` admits it.

    Raises InputError if `use` names it and the table has no such column.
    """
    has_features = len(feature_columns(rows)) > 0
    if TABULAR in use and not has_features:
        raise InputError(
            "--use tabular: the table has no feature columns; name them in --features of data.prepare"
        )
    return has_features and (not use or TABULAR in use)


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


def check_no_leak(
    table: FusionTable, validate: tuple[int, ...], *, allow: bool, out_of_fold: bool = False
) -> bool:
    """Whether a score on the `validate` folds would be leaked: an encoder was fitted on their rows.

    Raises InputError in that case unless `allow`. It says what to do, which depends on whether the run is
    `out_of_fold`.
    """
    leaks: dict[str, list[int]] = {}
    for name, meta in table.meta.items():
        if folds := splits.leaked_folds(meta["fitted_on"], validate):
            leaks[name] = folds
    if leaks and not allow:
        listed = ", ".join(f"{name} (folds {folds})" for name, folds in leaks.items())
        remedy = (
            "train the encoder with --folds, or freeze it"
            if out_of_fold
            else "use the --holdout that the encoder was trained with"
        )
        raise InputError(
            f"no honest validation score: the encoder of {listed} was fitted on rows it would be scored on; "
            f"{remedy}, or --allow-leak for a number called leaked"
        )
    return bool(leaks)
