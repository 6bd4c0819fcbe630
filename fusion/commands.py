"""The commands that both fusion packages have. Their scripts say which package, and here is what they do.

What needs torch is imported inside, so that --help is instant.
"""

from __future__ import annotations

from typing import Any

from fusion.config import EvaluateSettings, Package, PredictSettings
from training.settings import parse_settings


def train(package: Package, argv: list[str] | None, *, description: str) -> dict[str, Any]:
    """Fit the package's model and score it; returns the content of summary.json."""
    settings = parse_settings(package.settings, argv, description=description, presets=package.presets)
    from fusion.experiment import build_data, fit_and_score

    data = build_data(package, settings)
    return fit_and_score(package, settings, data)


def evaluate_by_groups(package: Package, argv: list[str] | None, *, description: str) -> dict[str, Any]:
    """Score a finished run again, by groups; returns the content of scores.json without the groups."""
    settings = parse_settings(EvaluateSettings, argv, description=description)
    from fusion.experiment import evaluate, load_trained

    return evaluate(load_trained(package, settings))


def predict_test(package: Package, argv: list[str] | None, *, description: str) -> None:
    """Price the rows of test.csv with a finished run."""
    settings = parse_settings(PredictSettings, argv, description=description)
    from fusion.experiment import load_trained, write_submission

    write_submission(load_trained(package, settings), settings)
