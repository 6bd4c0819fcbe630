"""Score a finished run on its validation folds, in all and by price bin and kind of unit.

    python -m qwen3_finetune.evaluate

writes evaluation.csv, evaluation.json and error_by_price.png into the run folder. train.py ends with the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, write_json
from contracts.smape import best_constant, price_bin, smape, smape_by_group, smape_with_error
from qwen3_finetune.config import ApplySettings
from qwen3_finetune.data import read_rows
from qwen3_finetune.finished import FinishedRun
from training.settings import parse_settings


def evaluate(settings: ApplySettings) -> float:
    """Write the three files, print the table and return SMAPE on the validation folds.

    Raises InputError for a run that kept no rows for validation.
    """
    from training.plots import plot_error_by_price

    finished = FinishedRun(settings)
    folds = finished.settings.roles
    if not folds.validate:
        raise InputError(f"{finished.run.path}: trained with --holdout null, it has no validation rows")
    rows = read_rows(finished.workspace, "train")
    chosen = rows.of_folds(folds.validate)
    _, log_price = finished.encode(rows, chosen)

    price, predicted = np.expm1(rows.log_price[chosen].astype(float)), np.expm1(log_price.astype(float))
    groups = {"price": price_bin(price), "unit": rows.unit_kind[chosen]}
    table = smape_by_group(price, predicted, groups)
    score, error = smape_with_error(price, predicted)
    constant = best_constant(np.expm1(rows.log_price[rows.of_folds(folds.fit)].astype(float)))
    constant_score = smape(price, np.full(len(price), constant))

    path, title = finished.run.path, f"{settings.run}: SMAPE {score:.2f} ± {error:.2f} on unseen rows"
    with atomic_write(path / "evaluation.csv") as file:
        table.to_csv(file, index=False)
    summary = {"smape": score, "standard_error": error, "rows": len(chosen), "constant_smape": constant_score}
    write_json(
        path / "evaluation.json",
        {**summary, "validation_folds": folds.validate, "groups": table.to_dict("records")},
    )
    plot_error_by_price(path / "error_by_price.png", price, predicted, title=title)
    print(table.to_string(index=False, float_format="{:.2f}".format))
    print(
        f"{title} (folds {', '.join(map(str, folds.validate))}); the best constant has {constant_score:.2f}"
    )
    return score


def main(argv: Sequence[str] | None = None) -> None:
    evaluate(parse_settings(ApplySettings, argv, description=__doc__.split("\n")[0]))


if __name__ == "__main__":
    run_entry_point(main)
