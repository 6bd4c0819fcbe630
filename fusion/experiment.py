"""One protocol for every fusion model: fit, stop and validate on rows that were kept apart from the start.

The encoders behind the embeddings fitted on the same `fit` and `stop` folds, so the `validate` rows are new
to the whole system. A score on rows that any encoder has seen is refused, or called leaked on request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from contracts import splits
from contracts.files import read_json
from contracts.predictions import remove_predictions, write_predictions
from contracts.splits import Roles
from contracts.workspace import SPLITS, Workspace
from fusion.config import Package, TrainingSettings
from fusion.evaluation import gate_shares, write_scores
from fusion.finished import open_model, prediction_meta
from fusion.fitting import ALL_ROWS, TrainingData, fit_model, median_learning_rates
from training.processes import from_first_process, process, process_group
from training.run_folder import RunFolder


@dataclass
class Validated:
    """Rows that were new to the models that priced them."""

    rows: np.ndarray
    """positions (n,) in the training table"""
    log_price: np.ndarray
    """(n,) log1p of dollars"""
    gate: Tensor | None = None
    """(n, E) shares of the experts, where one mixture priced all the rows"""


def fit_and_score(package: Package, settings: TrainingSettings, data: TrainingData) -> dict[str, Any]:
    """Train, keep the best weights, score them on the validation rows, leave everything in the run folder.

    Returns the content of summary.json. Under torchrun, only the first process returns the scores with it.

    Raises InputError if --resume meets a run of other settings or other files, a finished one included.
    """
    run = RunFolder(Workspace(settings.workspace).path("run", name=settings.run))
    if run.already_complete(settings.resume, settings, data.inputs):
        return read_json(run.path / "summary.json")
    with process_group(data.table.valid.device):
        return Experiment(package, data, Workspace(settings.workspace)).conduct(settings)


@dataclass
class Experiment:
    """The models of a run, trained one after another, each in its folder."""

    package: Package
    data: TrainingData
    workspace: Workspace

    def conduct(self, settings: TrainingSettings) -> dict[str, Any]:
        """The whole run, to its summary and its prices of the validation rows."""
        run = self._start(settings)
        if run:
            print(self.data.table.coverage())
            for split in SPLITS:  # an earlier run of this name is gone, and its prices with it
                remove_predictions(self.workspace, settings.run, split)
        if settings.folds:
            summary, validated = self._train_out_of_fold(settings, run)
        else:
            summary, validated = self._train_hold_out(settings, run)
        if run and validated and not self.data.is_leaked:
            self._write_prices(settings, validated)
        if run:
            run.finish(**summary)
        return summary

    def _start(self, settings: TrainingSettings) -> RunFolder | None:
        """Open the run folder of a model, in the first process; the others only compute."""
        if process()[0] != 0:
            return None
        return RunFolder.start(
            self.workspace.path("run", name=settings.run),
            settings,
            inputs=self.data.inputs,
            resume=settings.resume,
            report_to=settings.report_to,
        )

    def _train_out_of_fold(
        self, settings: TrainingSettings, run: RunFolder | None
    ) -> tuple[dict[str, Any], Validated | None]:
        """One model per hold-out, and one of all rows. Returns the summary, and the prices of all training rows."""
        parts = [settings.part(holdout) for holdout in range(settings.folds)]
        of_parts = []
        best_epochs = []
        for part in parts:
            own = self._start(part)
            summary, validated = self._train_hold_out(part, own)
            best_epochs.append(summary["best_epoch"])
            if own and validated:
                own.finish(**summary)
                of_parts.append(validated)
        self._train_all_rows(settings.part(None), validated=parts)
        whole = {"parts": [part.run for part in parts], "best_epoch": best_epochs}
        if run is None:
            return whole, None
        validated = Validated(
            np.concatenate([part.rows for part in of_parts]),
            np.concatenate([part.log_price for part in of_parts]),
        )
        return whole | self._score(run, validated), validated

    def _train_hold_out(
        self, settings: TrainingSettings, run: RunFolder | None
    ) -> tuple[dict[str, Any], Validated | None]:
        """The model of one hold-out, and with --refit that of all rows; `run` is the model's folder.

        Returns the summary and, in the first process, the prices of the validation rows if there are any.
        """
        summary = self._fit(settings, run, settings.roles)
        validated = None
        if run and settings.roles.validate:
            validated = self._price(settings)
            summary |= self._score(run, validated)
        if settings.refit:
            self._train_all_rows(settings.part(None), validated=[settings])
        return summary, validated

    def _train_all_rows(self, settings: TrainingSettings, *, validated: list[TrainingSettings]) -> None:
        """The model of all rows, in its folder. It follows those that were `validated`."""
        run = self._start(settings)
        summary = self._fit(settings, run, ALL_ROWS, validated=validated)
        if run:
            run.finish(**summary)

    def _fit(
        self,
        settings: TrainingSettings,
        run: RunFolder | None,
        roles: Roles,
        *,
        validated: list[TrainingSettings] | None = None,
    ) -> dict[str, Any]:
        """Fit one model in the folder of `run`, or one per seed in folders inside. Returns what the summary says.

        Args:
            validated: models that a model of all rows follows, as it has no row to stop on.
        """
        outcomes = []
        for number, one in enumerate(settings.by_seed()):
            own = run if settings.seeds == 1 else self._start(one)
            rates = self._learning_rates(validated, number) if validated else None
            outcome = fit_model(self.package, one, self.data, own, roles, rates)
            if settings.seeds == 1:
                return outcome
            if own:
                own.finish(**outcome)
            outcomes.append(outcome)
        summary: dict[str, Any] = {"parameters": sum(outcome["parameters"] for outcome in outcomes)}
        for name in ("epochs", "best_epoch", "stop_smape"):
            if name in outcomes[0]:
                summary[name] = [outcome[name] for outcome in outcomes]
        return summary

    def _learning_rates(self, validated: list[TrainingSettings], seed_number: int) -> list[float]:
        """Those that a model of all rows follows: of the validated models with its seed."""
        runs = [settings.by_seed()[seed_number].run for settings in validated]
        folders = [self.workspace.path("run", name=run) for run in runs]
        # the other processes may look before the first one has written
        return from_first_process(median_learning_rates(folders) if process()[0] == 0 else None)

    def _price(self, settings: TrainingSettings) -> Validated:
        """The prices that a fitted model, as it was saved, gives to its validation rows."""
        trained = open_model(self.package, self.workspace, settings.run, self.data.table.valid.device)
        rows = self.data.table.rows_in(settings.roles.validate)
        table = self.data.table.with_tabular(trained.columns)
        gate = gate_shares(trained.model, table, rows)
        return Validated(rows.numpy(), trained.log_price(table, rows), gate)

    def _score(self, run: RunFolder, validated: Validated) -> dict[str, Any]:
        """Write the scores of validation rows into the run's folder, and return the overall one."""
        name = "leaked" if self.data.is_leaked else "validation"
        price = np.expm1(validated.log_price)
        scores = write_scores(
            run.path, self.data.table, validated.rows, price, name=name, gate=validated.gate
        )
        smape = scores[f"{name}_smape"]
        print(
            f"{run.path.name}: {name} SMAPE {smape:.2f} ± {scores['standard_error']:.2f} on {scores['rows']} rows"
        )
        return scores

    def _write_prices(self, settings: TrainingSettings, validated: Validated) -> None:
        """Write the prices of the validation rows as predictions/<run>_train.csv, in the order of the table."""
        in_order = np.argsort(validated.rows)
        priced = self.data.table.rows.iloc[validated.rows[in_order]]
        if settings.folds:
            model_fitted_on = splits.fitted_out_of_fold(settings.folds)
        else:
            model_fitted_on = splits.fitted_on(encoder_folds=settings.roles.fitted_on)
        write_predictions(
            self.workspace,
            settings.run,
            "train",
            priced["sample_id"].to_numpy(),
            validated.log_price[in_order],
            meta=prediction_meta(self.package, settings.run, model_fitted_on, self.data.table),
            fold=priced["fold"].to_numpy(),
        )
