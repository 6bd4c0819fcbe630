"""Score a finished run again on the rows that it was not trained on: scores.json and the plots.

python -m text_tabular.evaluate --run text_tabular --workspace OUT
"""

from __future__ import annotations

from typing import Any

from contracts.errors import InputError, run_entry_point
from contracts.splits import roles
from contracts.workspace import Workspace
from text_tabular.config import FinishedSettings, TextTabularSettings
from training.run_folder import RunFolder
from training.settings import parse_settings


def main(argv: list[str] | None = None) -> dict[str, Any]:
    applied = parse_settings(FinishedSettings, argv, description=__doc__.split("\n")[0])
    from text_tabular.data import TrainingTable
    from text_tabular.evaluation import write_scores
    from text_tabular.finished import Finished

    folder = Workspace(applied.workspace).path("run", name=applied.run)
    settings = RunFolder.finished(folder, "text_tabular").settings(TextTabularSettings)
    if settings.folds:
        raise InputError(
            f"{folder}: an out-of-fold run; evaluate one of its models, such as {applied.run}/fold_0"
        )
    trained = Finished.open(folder, applied.device)
    table = TrainingTable.read(settings, trained.roles)
    validate = table.rows_in(roles(settings.holdout).validate)
    if not len(validate):
        raise InputError(f"{applied.run} was trained with --holdout null: no rows are left to validate on")
    scores = write_scores(folder, trained.held_out(table, validate), trained.target, trained.calibration)
    for name, value in scores.items():
        print(f"{name:34} {value:.4g}")
    return scores


if __name__ == "__main__":
    run_entry_point(main)
