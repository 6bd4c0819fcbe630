"""Finished runs, opened for use: one encoder, or the encoders of an out-of-fold run as if they were one.

Legend: N rows of the table, n chosen rows, D_in width of the encoder.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from contracts.errors import InputError
from contracts.files import read_json, sha256_file
from contracts.splits import fitted_on, fitted_out_of_fold
from contracts.workspace import Workspace
from qwen3_finetune.config import QwenSettings, choose_tokens_per_batch
from qwen3_finetune.data import N_STRUCTURAL, TextInputs, TextRows, Tokenize
from training.alignment import Alignment, alignment_rows
from training.run_folder import RunFolder, part_folder


@dataclass(frozen=True)
class Computation:
    """How a run is computed; what it computes does not depend on this beyond rounding."""

    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>"""
    precision: str = "auto"
    """auto, fp32 or bf16"""
    tokens_per_batch: int | None = None
    """padded tokens per batch; None suits the device"""
    model: str | None = None
    """where the pretrained model lies now; None is where training found it"""


def finished_folder(workspace: Workspace, run: str) -> RunFolder:
    """The folder of a finished run.

    Raises:
        InputError: there is no finished run, or the folds changed after it, so that rows which it was fitted on would
            pass for unseen.
    """
    folder = RunFolder.finished(workspace.path("run", name=run), "qwen3_finetune")
    folds = workspace.path("folds")
    inputs = read_json(folder.path / "manifest.json")["inputs"]
    if sha256_file(folds) not in inputs.values():
        raise InputError(f"{folds}: not the folds that {folder.path.name} was fitted on; train it again")
    return folder


def prices_fitted_on(run: RunFolder) -> list[list[int]]:
    """For the rows of each fold, the folds that the model which prices them was fitted on, its head included."""
    settings = run.settings(QwenSettings)
    if run.is_out_of_fold:
        return fitted_out_of_fold(settings.folds)
    return fitted_on(encoder_folds=settings.roles.fitted_on)


def embeddings_fitted_on(run: RunFolder) -> list[list[int]]:
    """For the rows of each fold, the folds that the encoder which embeds them was fitted on."""
    frozen = run.settings(QwenSettings).train == "head"
    # the embeddings of an out-of-fold run include the price of its head
    if frozen and not run.is_out_of_fold:
        return fitted_on(encoder_folds=())
    return prices_fitted_on(run)


class FinishedRun:
    """One trained encoder with its tokenizer and its head, from its run folder.

    Raises:
        InputError: there is no finished run, or it is out of fold and has several encoders.
    """

    def __init__(self, folder: Path, computation: Computation):
        from qwen3_finetune.backbone import load_tokenizer
        from qwen3_finetune.model import build_model
        from training.device import choose_device, guard_torchvision

        guard_torchvision()
        from qwen3_finetune.spec import EncoderSpec

        self.run = RunFolder.finished(folder, "qwen3_finetune")
        if self.run.is_out_of_fold:
            raise InputError(
                f"{folder}: has one encoder per hold-out; choose one, such as --run {folder.name}/fold_0"
            )
        trained_with = self.run.settings(QwenSettings)
        self.settings = dataclasses.replace(
            trained_with,
            precision=computation.precision,
            model=computation.model or trained_with.model,
        )
        device = choose_device(computation.device)
        spec = EncoderSpec.resolve(self.settings, device, trained=self.run.path)
        tokenizer = load_tokenizer(spec.tokenizer_source(self.run.path))
        self.tokenize = Tokenize.of(tokenizer, spec)
        self.dtype = spec.dtype
        self.tokens_per_batch = choose_tokens_per_batch(computation.tokens_per_batch, device.type)
        self.model = build_model(
            spec,
            device,
            len(tokenizer),
            head_hidden=self.settings.head_hidden,
            seed=self.settings.seed,
        )

    @property
    def width(self) -> int:
        """D_in + 3"""
        return self.model.width

    def encode(self, rows: TextRows, part: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D_in + 3) and log price (n,), float32, of the rows in `part`, in their order."""
        from qwen3_finetune.model import encode

        chosen = np.arange(len(rows))[part]
        inputs = TextInputs(
            self.tokenize,
            [rows.texts[row] for row in chosen],
            rows.structural[chosen],
            padding_side=self.model.padding_side,
        )
        batches = inputs.batches(np.arange(len(chosen)), self.tokens_per_batch)
        features = np.empty((len(chosen), self.width), np.float32)
        log_price = np.empty(len(chosen), np.float32)
        for batch, batch_features, batch_log_price in encode(self.model, inputs, batches, self.dtype):
            features[batch] = batch_features
            log_price[batch] = batch_log_price
        return features, log_price

    def standardise(self, structural: np.ndarray) -> np.ndarray:
        """Raw structural features (n, 3) as the head of this run sees them."""
        import torch

        head = self.model.head
        raw = torch.from_numpy(structural).to(head.structural_mean.device)
        return head.standardise(raw).cpu().numpy()


class OutOfFoldRun:
    """The encoders of a run with --folds.

    A training row is embedded by the encoder that has not seen it, a row of any other table by the encoder of all
    rows. The encoders of the hold-outs are opened at the first training table, since pricing new products does not
    need them.

    Args:
        align: bring the embeddings into one space; False leaves them where each encoder put them.
    """

    def __init__(self, folder: Path, computation: Computation, *, align: bool = True):
        self.run = RunFolder.finished(folder, "qwen3_finetune")
        self.settings = self.run.settings(QwenSettings)
        self.computation = computation
        self.align = align
        self.whole = FinishedRun(folder / part_folder(None), computation)
        self._alignments: list[Alignment] | None = None

    @cached_property
    def parts(self) -> list[FinishedRun]:
        """The encoder of each hold-out."""
        folders = [self.run.path / part_folder(holdout) for holdout in range(self.settings.folds)]
        return [FinishedRun(folder, self.computation) for folder in folders]

    @property
    def width(self) -> int:
        """D_in + 1 + 3"""
        return self.whole.width + 1

    def encode(self, rows: TextRows, part: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D_in + 1 + 3) and log price (n,), float32, of the rows in `part`, in their order.

        Training rows have to come as their whole table, whatever the part, because the alignment is fitted on it.

        The columns are the embedding, log price and the structural features. Log price is among them because the
        models that read the features should not have to learn the encoder's head again.
        """
        chosen = np.arange(len(rows))[part]
        if rows.fold is None:
            features, log_price = self.whole.encode(rows, chosen)
        else:
            features, log_price = self._encode_out_of_fold(rows, chosen)
        return np.insert(features, -N_STRUCTURAL, log_price, axis=1), log_price

    def _encode_out_of_fold(self, rows: TextRows, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D_in + 3) and log price (n,) of training rows."""
        assert rows.fold is not None
        features = np.empty((len(chosen), self.whole.width), np.float32)
        log_price = np.empty(len(chosen), np.float32)
        embedding = features[:, :-N_STRUCTURAL]  # a view
        alignments = self.alignments(rows) if self.align else None
        for holdout, encoder in enumerate(self.parts):
            unseen = np.isin(rows.fold[chosen], encoder.settings.roles.validate)
            features[unseen], log_price[unseen] = encoder.encode(rows, chosen[unseen])
            if alignments is not None:
                embedding[unseen] = alignments[holdout](embedding[unseen])
        # every encoder standardises by its own rows, and one scale has to serve for all
        features[:, -N_STRUCTURAL:] = self.whole.standardise(rows.structural[chosen])
        return features, log_price

    def alignments(self, rows: TextRows) -> list[Alignment]:
        """One for each hold-out, fitted on rows that both its encoder and the encoder of all rows were fitted on.

        They are fitted once, at the first call.

        Args:
            rows: the training table.
        """
        if self._alignments is None:
            random = np.random.default_rng(self.settings.seed)
            self._alignments = [self._fit_alignment(encoder, rows, random) for encoder in self.parts]
        return self._alignments

    def _fit_alignment(self, encoder: FinishedRun, rows: TextRows, random: np.random.Generator) -> Alignment:
        assert rows.fold is not None
        sample = alignment_rows(rows.fold, encoder.settings.roles, random)
        if not len(sample):
            raise InputError(
                f"{self.run.path}: no row to align its encoders on; out-of-fold embeddings need the whole table train"
            )
        source, _ = encoder.encode(rows, sample)
        target, _ = self.whole.encode(rows, sample)
        return Alignment.fit(source[:, :-N_STRUCTURAL], target[:, :-N_STRUCTURAL])
