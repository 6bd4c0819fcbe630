"""The commands that both fusion packages have. Their scripts say which package, and here is what they do.

What needs torch is imported inside, so that --help is instant.
"""

from __future__ import annotations

from typing import Any

from fusion.config import EvaluateSettings, Package, PredictSettings, SubmitSettings
from training.settings import parse_settings


def train(package: Package, argv: list[str] | None, *, description: str) -> dict[str, Any]:
    """Fit the package's model and score it; returns the content of summary.json."""
    settings = parse_settings(package.settings, argv, description=description, presets=package.presets)
    from fusion.experiment import fit_and_score
    from fusion.fitting import build_data

    data = build_data(package, settings)
    return fit_and_score(package, settings, data)


def evaluate_by_groups(package: Package, argv: list[str] | None, *, description: str) -> dict[str, Any]:
    """Score a finished run again, by groups; returns the content of scores.json without the groups."""
    settings = parse_settings(EvaluateSettings, argv, description=description)
    from fusion.finished import evaluate

    return evaluate(package, settings)


def predict(package: Package, argv: list[str] | None, *, description: str) -> None:
    """Price the rows of a prepared table with a finished run."""
    settings, table = parse_settings(
        PredictSettings, argv, description=description, positional={"table": None}
    )
    from fusion.finished import write_prices

    write_prices(package, settings, table)


def predict_test(package: Package, argv: list[str] | None, *, description: str) -> None:
    """Price the rows of test.csv with a finished run, and write the submission."""
    settings = parse_settings(SubmitSettings, argv, description=description)
    from fusion.finished import write_submission

    write_submission(package, settings)
