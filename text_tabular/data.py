"""A table of texts, fields and labels as tensors, dealt into folds.

Legend: N rows, B rows of a batch, C chunks, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from contracts.errors import InputError
from contracts.splits import N_FOLDS, deal, group_rows
from contracts.tables import read_any
from fusion.tabular import TableColumns
from text_tabular.columns import ColumnRoles, Rows, Target, is_unlabelled, read_rows
from text_tabular.config import TextTabularSettings
from text_tabular.model import Batch
from text_tabular.texts import Chunker, with_fields

LENGTHS_TOGETHER = 16
"""Batches whose rows are sorted by length together: rows of like length need little padding, and the order of training
stays random on the larger scale."""
WARN_CLASSES_BELOW = 10
"""A class with fewer rows is absent from some folds, and its score there means little."""


@dataclass
class TrainingTable:
    """The labelled rows, their target and their folds."""

    rows: Rows
    target: Target
    values: np.ndarray
    """(N,) int64 number of the class, or float32 standardised number"""
    fold: np.ndarray
    """(N,) int, 0 to 9"""

    @classmethod
    def read(cls, settings: TextTabularSettings, roles: ColumnRoles) -> TrainingTable:
        """Raises InputError for a table that cannot be read by these roles or is too small for folds."""
        source = str(settings.train)
        table = read_any(settings.train)
        if settings.skip_unlabelled and roles.target in table:
            unlabelled = is_unlabelled(table[roles.target])
            table = table[~unlabelled].reset_index(drop=True)
            print(f"{source}: {unlabelled.sum()} rows without {roles.target} are left out")
        rows = read_rows(table, roles, source=source, with_target=True)
        assert rows.target is not None
        target = Target.fit(roles, rows.target, rows.ids, source)
        values = target.encode(rows.target, source)
        return cls(rows, target, values, deal_folds(rows, target, values, settings.split_seed, source))

    def rows_in(self, folds: tuple[int, ...]) -> np.ndarray:
        """Positions of the rows in these folds."""
        return np.flatnonzero(np.isin(self.fold, folds))


def deal_folds(rows: Rows, target: Target, values: np.ndarray, seed: int, source: str) -> np.ndarray:
    """(N,) int: groups, and rows with the same text, stay together; classes are spread evenly.

    Raises InputError for fewer groups than folds.
    """
    texts = pd.Series([" ".join(" ".join(messages).lower().split()) for messages in rows.messages])
    groups = group_rows(rows.groups.reset_index(drop=True), texts)
    distinct = len(np.unique(groups))
    if distinct < N_FOLDS:
        raise InputError(
            f"{source}: {distinct} distinct groups of rows, at least {N_FOLDS} are needed for folds"
        )
    if target.task == "classification":
        counts = np.bincount(values, minlength=len(target.classes))
        for name, count in zip(target.classes, counts, strict=True):
            if count < WARN_CLASSES_BELOW:
                print(f"class {name!r} has {count} rows only: some folds lack it")
        strata = values
    else:
        ranks = pd.Series(values).rank(method="first")
        strata = pd.qcut(ranks, min(N_FOLDS, len(values) // N_FOLDS), labels=False).to_numpy()
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        return deal(strata, groups, seed)


@dataclass
class Inputs:
    """What the model reads of N rows."""

    chunks: list[list[list[int]]]
    """N lists of chunks of token ids"""
    fields: Tensor
    """(N, D_tab) float32"""
    fields_valid: Tensor
    """(N,) bool"""
    pad: int
    """token id that fills chunks up"""
    pooled: Tensor | None = None
    """(N, encoder width): the texts' averages, where the encoder is not trained"""

    @classmethod
    def of(
        cls,
        rows: Rows,
        chunker: Chunker | None,
        table: TableColumns,
        *,
        fields_as_text: bool,
        reads_fields: bool,
    ) -> Inputs:
        """Args:
        chunker: None where no text is read.
        """
        messages = with_fields(rows.messages, rows.fields) if fields_as_text else rows.messages
        chunks = [chunker(own) for own in messages] if chunker else [[] for _ in messages]
        matrix, stated = table.matrix(rows.fields)
        if not reads_fields:
            stated = np.zeros(len(rows), bool)
        pad = 0 if chunker is None else int(chunker.tokenizer.pad_token_id or 0)
        return cls(chunks, torch.from_numpy(matrix), torch.from_numpy(stated), pad)

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens per row."""
        return np.array([sum(map(len, chunks)) for chunks in self.chunks])

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows at these positions."""
        own = [self.chunks[row] for row in rows]
        flat = [chunk for chunks in own for chunk in chunks]
        longest = max(map(len, flat), default=0)
        tokens = torch.full((len(flat), longest), self.pad)
        token_valid = torch.zeros(len(flat), longest, dtype=torch.bool)
        for position, chunk in enumerate(flat):
            tokens[position, : len(chunk)] = torch.tensor(chunk)
            token_valid[position, : len(chunk)] = True
        chunk_valid = torch.zeros(len(rows), max(map(len, own), default=0) or 1, dtype=torch.bool)
        for position, chunks in enumerate(own):
            chunk_valid[position, : len(chunks)] = True
        index = torch.from_numpy(rows)
        pooled = None if self.pooled is None else self.pooled[index]
        if pooled is not None:
            tokens, token_valid = tokens[:0], token_valid[:0]
        return Batch(tokens, token_valid, chunk_valid, self.fields[index], self.fields_valid[index], pooled)


def training_batches(lengths: np.ndarray, rows: np.ndarray, batch_size: int, seed: int) -> list[np.ndarray]:
    """All rows once in random order, as batches of rows of like length."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(rows)
    batches = []
    window = LENGTHS_TOGETHER * batch_size
    for start in range(0, len(shuffled), window):
        together = shuffled[start : start + window]
        together = together[np.argsort(lengths[together], kind="stable")]
        batches += [together[at : at + batch_size] for at in range(0, len(together), batch_size)]
    return [batches[number] for number in generator.permutation(len(batches))]


def by_length(lengths: np.ndarray, rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """The rows once, as batches, longest first: a batch that does not fit into memory fails at once."""
    in_order = rows[np.argsort(-lengths[rows], kind="stable")]
    for start in range(0, len(in_order), batch_size):
        yield in_order[start : start + batch_size]
