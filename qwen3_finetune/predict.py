"""Predict prices with a finished run.

    python -m qwen3_finetune.predict train     # predictions/qwen3_finetune_train.csv: sample_id, log_price, fold
    python -m qwen3_finetune.predict test      # predictions/qwen3_finetune_test.csv: sample_id, log_price

In train most rows are rows that the run was fitted on; only those of its validation folds are honest predictions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, read_json, sha256_file
from contracts.runs import RunFolder
from contracts.settings import parse_settings
from contracts.workspace import SPLITS, Workspace
from qwen3_finetune.config import ApplySettings, QwenSettings
from qwen3_finetune.data import TextInputs, TextRows, Tokenize, predictions_table, read_rows


class FinishedRun:
    """A trained model with its tokenizer, opened from its run folder.

    Raises:
        InputError: no finished run, or the folds changed since: rows it was fitted on would pass for unseen.
    """

    def __init__(self, apply: ApplySettings):
        from contracts.torch_setup import choose_device, choose_dtype
        from qwen3_finetune.model import build_model, load_tokenizer

        self.workspace = Workspace(apply.workspace)
        self.run = RunFolder.finished(self.workspace.path("run", name=apply.run), "qwen3_finetune")
        self.check_folds()
        self.settings = dataclasses.replace(self.run.settings(QwenSettings), precision=apply.precision)
        self.tokens_per_batch = apply.tokens_per_batch
        stored, device = self.run.path / "tokenizer", choose_device(apply.device)
        tokenizer = load_tokenizer(
            str(stored) if stored.is_dir() else self.settings.tokenizer or self.settings.model
        )
        self.model = build_model(self.settings, device, len(tokenizer), trained=self.run.path)
        self.tokenize = Tokenize.of(tokenizer, self.settings)
        self.dtype = choose_dtype(apply.precision, device)

    def check_folds(self) -> None:
        folds = self.workspace.path("folds")
        fitted = read_json(self.run.path / "manifest.json")["inputs"]
        if sha256_file(folds) not in fitted.values():
            raise InputError(
                f"{folds}: not the folds that {self.run.path.name} was fitted on; train it again"
            )

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


def main(argv: Sequence[str] | None = None) -> None:
    settings, split = parse_settings(
        ApplySettings, argv, description=__doc__.split("\n")[0], positional={"split": SPLITS}
    )
    workspace = Workspace(settings.workspace)
    rows = read_rows(workspace, split)
    _, log_price = FinishedRun(settings).encode(rows)
    path = workspace.path("predictions", name=settings.run, split=split)
    with atomic_write(path) as file:
        predictions_table(rows, log_price).to_csv(file, index=False)
    print(f"{path}: {len(rows)} rows, median price ${np.expm1(np.median(log_price)):.2f}")


if __name__ == "__main__":
    run_entry_point(main)
