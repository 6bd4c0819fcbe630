"""Finished runs, opened for use: one encoder, or the encoders of an out-of-fold run as if they were one.

The encoders of different folds span different spaces, so the embeddings of each are brought into the space of the
encoder of all rows, which embeds test.csv, by the rotation that fits best on rows which both were fitted on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from contracts.errors import InputError
from contracts.files import read_json, sha256_file
from contracts.splits import roles
from contracts.workspace import STRUCTURAL_FEATURES, Workspace
from qwen3_finetune.config import ApplySettings, QwenSettings, choose_tokens_per_batch, part_name
from qwen3_finetune.data import TextInputs, TextRows, Tokenize, read_rows
from training.run_folder import RunFolder

N_STRUCTURAL = len(STRUCTURAL_FEATURES)
ALIGNMENT_ROWS = 2048
"""at most, for each rotation; several times the width is enough"""


def open_run(apply: ApplySettings, *, align: bool = True) -> FinishedRun | OutOfFoldRun:
    """The run --run, of either kind; `align` as OutOfFoldRun has it."""
    run = finished_folder(Workspace(apply.workspace), apply.run)
    return OutOfFoldRun(apply, align=align) if is_out_of_fold(run) else FinishedRun(apply)


def is_out_of_fold(run: RunFolder) -> bool:
    """Whether it holds one encoder for each hold-out rather than one."""
    return (run.path / "all").is_dir()


def finished_folder(workspace: Workspace, run: str) -> RunFolder:
    """Raises InputError: no finished run, or the folds changed since, so that fitted rows would pass for unseen."""
    folder = RunFolder.finished(workspace.path("run", name=run), "qwen3_finetune")
    folds = workspace.path("folds")
    if sha256_file(folds) not in read_json(folder.path / "manifest.json")["inputs"].values():
        raise InputError(f"{folds}: not the folds that {folder.path.name} was fitted on; train it again")
    return folder


class FinishedRun:
    """One trained encoder with its tokenizer, opened from its run folder.

    Raises:
        InputError: no finished run, or the folds changed since: rows it was fitted on would pass for unseen.
    """

    def __init__(self, apply: ApplySettings):
        from qwen3_finetune.encoder import load_tokenizer
        from qwen3_finetune.model import build_model
        from training.device import choose_device, choose_dtype

        self.workspace = Workspace(apply.workspace)
        self.run = finished_folder(self.workspace, apply.run)
        self.settings = dataclasses.replace(self.run.settings(QwenSettings), precision=apply.precision)
        stored, device = self.run.path / "tokenizer", choose_device(apply.device)
        self.tokens_per_batch = choose_tokens_per_batch(apply.tokens_per_batch, device.type)
        tokenizer = load_tokenizer(
            str(stored) if stored.is_dir() else self.settings.tokenizer or self.settings.model
        )
        self.model = build_model(self.settings, device, len(tokenizer), trained=self.run.path)
        self.tokenize = Tokenize.of(tokenizer, self.settings)
        self.dtype = choose_dtype(apply.precision, device)

    @property
    def width(self) -> int:
        return self.model.width

    def encode(self, rows: TextRows, part: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D_in + 3) and log price (n,), float32, of these rows, in their order."""
        from qwen3_finetune.model import encode

        chosen = np.arange(len(rows))[part]
        texts, side = [rows.texts[row] for row in chosen], self.model.padding_side
        inputs = TextInputs(self.tokenize, texts, rows.structural[chosen], padding_side=side)
        batches = inputs.batches(np.arange(len(chosen)), self.tokens_per_batch)
        features = np.empty((len(chosen), self.model.width), np.float32)
        log_price = np.empty(len(chosen), np.float32)
        for at, batch_features, batch_log_price in encode(self.model, inputs, batches, self.dtype):
            features[at], log_price[at] = batch_features, batch_log_price
        return features, log_price

    def standardise(self, structural: np.ndarray) -> np.ndarray:
        """Raw structural features (n, 3) as the head of this run sees them."""
        import torch

        head = self.model.head
        return head.standardise(torch.from_numpy(structural).to(head.log_price_mean.device)).cpu().numpy()


@dataclass
class Alignment:
    """x ↦ (x − source_mean) R + target_mean: a rotation (or reflection) and a shift, so distances stay."""

    source_mean: np.ndarray
    """(D_in,)"""
    rotation: np.ndarray
    """R (D_in, D_in), orthogonal"""
    target_mean: np.ndarray
    """(D_in,)"""

    @classmethod
    def fit(cls, source: np.ndarray, target: np.ndarray) -> Alignment:
        """The one that brings `source` (n, D_in) nearest to `target` (n, D_in) in least squares.

        R = U Vᵀ with U S Vᵀ = (source − mean)ᵀ (target − mean): Schönemann 1966, "A generalized solution of the
        orthogonal Procrustes problem".
        """
        source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
        u, _, vt = np.linalg.svd((source - source_mean).T @ (target - target_mean))
        return cls(source_mean, u @ vt, target_mean)

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings - self.source_mean) @ self.rotation + self.target_mean


class OutOfFoldRun:
    """The encoders of a run with --folds. A training row is embedded by the one that has not seen it, a test row by
    the one of all rows.

    Args:
        align: bring the embeddings into one space; False leaves each where its encoder put it.
    """

    def __init__(self, apply: ApplySettings, *, align: bool = True):
        self.workspace = Workspace(apply.workspace)
        self.run = finished_folder(self.workspace, apply.run)
        self.settings = self.run.settings(QwenSettings)
        self.whole, *self.parts = (
            FinishedRun(dataclasses.replace(apply, run=part_name(apply.run, holdout)))
            for holdout in (None, *range(self.settings.folds))
        )
        self.align = align

    @property
    def width(self) -> int:
        return self.whole.width + 1

    def encode(self, rows: TextRows, part: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D_in + 1 + 3), the one in between being log price, and log price (n,).

        The log price is a feature because a stacker should not have to learn the encoder's head again.
        """
        chosen = np.arange(len(rows))[part]
        if rows.fold is None:
            features, log_price = self.whole.encode(rows, chosen)
            return self._with_log_price(features, log_price), log_price
        features = np.empty((len(chosen), self.whole.width), np.float32)
        log_price = np.empty(len(chosen), np.float32)
        for holdout, encoder in enumerate(self.parts):
            unseen = np.isin(rows.fold[chosen], encoder.settings.roles.validate)
            features[unseen], log_price[unseen] = encoder.encode(rows, chosen[unseen])
            if self.align:
                features[unseen, :-N_STRUCTURAL] = self.alignments[holdout](features[unseen, :-N_STRUCTURAL])
        # each encoder standardises them by its own rows
        features[:, -N_STRUCTURAL:] = self.whole.standardise(rows.structural[chosen])
        return self._with_log_price(features, log_price), log_price

    def _with_log_price(self, features: np.ndarray, log_price: np.ndarray) -> np.ndarray:
        return np.insert(features, features.shape[1] - N_STRUCTURAL, log_price, axis=1)

    @cached_property
    def alignments(self) -> list[Alignment]:
        """One for each part, from rows that both the part and the encoder of all rows were fitted on."""
        rows = read_rows(self.workspace, "train")
        random = np.random.default_rng(self.settings.seed)
        alignments = []
        for encoder in self.parts:
            both = rows.of_folds(sorted(set(encoder.settings.roles.fit) & set(roles(None).fit)))
            sample = np.sort(random.choice(both, min(len(both), ALIGNMENT_ROWS), replace=False))
            source, target = (run.encode(rows, sample)[0][:, :-N_STRUCTURAL] for run in (encoder, self.whole))
            alignments.append(Alignment.fit(source, target))
        return alignments
