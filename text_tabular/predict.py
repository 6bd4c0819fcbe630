"""Predict the rows of any table with a finished run.

python -m text_tabular.predict --run text_tabular --input test.csv --output predictions.csv --workspace OUT
"""

from __future__ import annotations

from contracts.errors import InputError, run_entry_point
from contracts.tables import iterate_table, table_format, table_writer
from contracts.workspace import Workspace
from text_tabular.config import PredictSettings
from training.settings import parse_settings

ROWS_AT_ONCE = 4096
"""Rows that are read, predicted and written together, so that a table of any length needs little memory."""


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(PredictSettings, argv, description=__doc__.split("\n")[0])
    from tqdm import tqdm

    from text_tabular.finished import Finished

    table_format(settings.output)
    if settings.output.exists() and not settings.overwrite:
        raise InputError(f"{settings.output}: this file exists; --overwrite replaces it")
    folder = Workspace(settings.workspace).path("run", name=settings.run)
    trained = Finished.open(folder, settings.device)
    rows = 0
    with table_writer(settings.output) as writer, tqdm(desc="predict", unit=" rows", delay=2) as progress:
        for piece in iterate_table(settings.input, ROWS_AT_ONCE):
            predicted = trained.predict(piece, source=str(settings.input))
            if not trained.roles.id:  # rows are numbered over the whole table
                predicted[predicted.columns[0]] = range(rows, rows + len(predicted))
            writer.write(predicted)
            rows += len(predicted)
            progress.update(len(predicted))
    print(f"{settings.output}: {rows} rows")


if __name__ == "__main__":
    run_entry_point(main)
