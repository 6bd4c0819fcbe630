"""Score a finished run on its validation folds, over all rows, by price bin and by kind of unit.

    python -m qwen3_finetune.evaluate

Writes evaluation.csv, evaluation.json and error_by_price.png into the run folder. train.py ends with the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, write_json
from contracts.smape import best_constant, price_bin, smape, smape_by_group, smape_with_error
from contracts.workspace import Workspace
from qwen3_finetune.config import ApplySettings
from qwen3_finetune.data import read_rows
from qwen3_finetune.finished import Computation, FinishedRun, finished_folder
from training.settings import parse_settings


def evaluate(settings: ApplySettings) -> float:
    """Write the three files, print the table and return the SMAPE on the validation folds.

    Raises InputError for a run that kept no rows for validation.
    """
    from training.plots import plot_error_by_price

    workspace = Workspace(settings.workspace)
    computation = Computation(settings.device, settings.precision, settings.tokens_per_batch)
    finished = FinishedRun(finished_folder(workspace, settings.run).path, computation)
    folds = finished.settings.roles
    if not folds.validate:
        raise InputError(f"{finished.run.path}: trained with --holdout null, it has no validation rows")
    rows = read_rows(workspace, "train")
    assert rows.log_price is not None
    all_prices = np.expm1(rows.log_price.astype(float))

    held_out = rows.of_folds(folds.validate)
    price = all_prices[held_out]
    _, log_price = finished.encode(rows, held_out)
    predicted = np.expm1(log_price.astype(float))
    table = smape_by_group(price, predicted, {"price": price_bin(price), "unit": rows.unit_kind[held_out]})
    score, error = smape_with_error(price, predicted)
    constant = best_constant(all_prices[rows.of_folds(folds.fit)])
    constant_score = smape(price, np.full(len(price), constant))

    folder = finished.run.path
    title = f"{settings.run}: SMAPE {score:.2f} ± {error:.2f} on unseen rows"
    with atomic_write(folder / "evaluation.csv") as file:
        table.to_csv(file, index=False)
    summary = {
        "smape": score,
        "standard_error": error,
        "rows": len(held_out),
        "constant_smape": constant_score,
        "validation_folds": folds.validate,
        "groups": table.to_dict("records"),
    }
    write_json(folder / "evaluation.json", summary)
    plot_error_by_price(folder / "error_by_price.png", price, predicted, title=title)
    print(table.to_string(index=False, float_format="{:.2f}".format))
    listed = ", ".join(map(str, folds.validate))
    print(f"{title} (folds {listed}); the best constant has {constant_score:.2f}")
    return score


def main(argv: Sequence[str] | None = None) -> None:
    evaluate(parse_settings(ApplySettings, argv, description=__doc__.split("\n")[0]))


if __name__ == "__main__":
    run_entry_point(main)
