"""A finished run, opened to predict.

Legend: N rows, K classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from contracts.errors import InputError
from contracts.files import read_versioned, write_json
from fusion.tabular import TableColumns
from text_tabular.columns import ColumnRoles, Rows, Target, read_rows
from text_tabular.config import TextTabularSettings
from text_tabular.data import Inputs, TrainingTable
from text_tabular.encoder import CONFIG, TOKENIZER, choose_trained, rebuild_encoder
from text_tabular.evaluation import HeldOut
from text_tabular.explain import text_shares
from text_tabular.loop import outputs_of
from text_tabular.metrics import Calibration
from text_tabular.model import TextTabular
from text_tabular.texts import Chunker
from training.device import choose_device
from training.run_folder import RunFolder, part_folder
from training.weights import read_weights, save_weights

SCHEMA = 1
DESCRIPTION = "model.json"
"""What the weights alone do not say: columns, target, fitted fields, calibration."""
WEIGHTS = "model.safetensors"


@dataclass
class Finished:
    """One trained model and everything that turns a table into its predictions."""

    settings: TextTabularSettings
    roles: ColumnRoles
    target: Target
    table: TableColumns
    calibration: Calibration
    chunker: Chunker | None
    model: TextTabular

    def inputs(self, rows: Rows) -> Inputs:
        return Inputs.of(
            rows,
            self.chunker,
            self.table,
            fields_as_text=self.settings.fields_as_text,
            reads_fields=self.settings.reads_fields,
        )

    def outputs(self, table: pd.DataFrame, *, source: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (N,) and outputs (N, K) or (N,) for a table of texts, every column str."""
        rows = read_rows(table, self.roles, source=source, with_target=False)
        outputs = outputs_of(self.model, self.inputs(rows), np.arange(len(rows)), self.settings.batch_size)
        return rows.ids, outputs.numpy()

    def predict(self, table: pd.DataFrame, *, source: str = "table") -> pd.DataFrame:
        """Column id (under its own name), predicted and, of classes, probability_<class>.

        Raises InputError for a table that lacks columns.
        """
        ids, outputs = self.outputs(table, source=source)
        return self.described(ids, outputs)

    def held_out(self, table: TrainingTable, rows: np.ndarray) -> HeldOut:
        """What the model says of training rows at these positions, which it has not seen."""
        inputs = self.inputs(table.rows)
        outputs = outputs_of(self.model, inputs, rows, self.settings.batch_size).numpy()
        shares = text_shares(self.model, inputs, rows, self.settings.batch_size)
        return HeldOut(outputs, table.values[rows], shares)

    def described(self, ids: np.ndarray, outputs: np.ndarray) -> pd.DataFrame:
        """Outputs as people read them."""
        predicted = pd.DataFrame({self.roles.id or "row": ids})
        if self.target.task == "regression":
            return predicted.assign(predicted=outputs * self.target.deviation + self.target.mean)
        probabilities = self.calibration.probabilities(outputs)
        names = np.array(self.target.classes)
        predicted["predicted"] = names[self.calibration.predicted(probabilities)]
        for number, name in enumerate(self.target.classes):
            predicted[f"probability_{name}"] = probabilities[:, number].round(6)
        return predicted

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Leave weights, tokenizer, the encoder's shape and the description in a run folder."""
        save_weights(folder / WEIGHTS, weights)
        if self.chunker is not None:
            self.chunker.tokenizer.save_pretrained(folder / TOKENIZER)
            assert self.model.encoder is not None
            self.model.encoder.config.save_pretrained(folder / CONFIG)  # type: ignore[union-attr, operator]
        content = {
            "schema": SCHEMA,
            "columns": self.roles.to_json(),
            "target": self.target.to_json(),
            "fields": self.table.to_json(),
            "calibration": asdict(self.calibration),
        }
        write_json(folder / DESCRIPTION, content)

    @classmethod
    def open(cls, folder: Path, device: str = "auto") -> Finished:
        """Open a finished run; of an out-of-fold run the model of all rows.

        Raises InputError: there is no finished run, or one of another version.
        """
        run = RunFolder.finished(folder, "text_tabular")
        if run.is_out_of_fold:
            folder = folder / part_folder(None)
            run = RunFolder.finished(folder, "text_tabular")
        return cls._read(folder, run.settings(TextTabularSettings), device)

    @classmethod
    def _read(cls, folder: Path, settings: TextTabularSettings, device: str) -> Finished:
        content = read_versioned(folder / DESCRIPTION, SCHEMA, "train it again")
        target = Target.from_json(content["target"])
        table = TableColumns.from_json(content["fields"])
        chunker, encoder = None, None
        if settings.reads_text:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER)
            chunker = Chunker(tokenizer, settings.chunk_tokens, settings.chunks)
            encoder = choose_trained(rebuild_encoder(folder), settings)
        model = TextTabular(settings, encoder, d_tab=table.width, outputs=target.outputs)
        try:
            model.load_state_dict(read_weights(folder / WEIGHTS))
        except RuntimeError as error:
            raise InputError(
                f"{folder / WEIGHTS}: not the weights of this run ({str(error)[:160]})"
            ) from None
        model.to(choose_device(device)).eval()
        roles = ColumnRoles.of(content["columns"], folder / DESCRIPTION)
        calibration = Calibration(**content["calibration"])
        return cls(settings, roles, target, table, calibration, chunker, model)
