"""Trackers: experiment programs that receive the metrics of a run, beside its own metrics.jsonl.

`--report-to` names one of those that Accelerate knows. TensorBoard writes into the run folder; wandb and MLflow write
where their own environment variables say (WANDB_MODE, WANDB_DIR, MLFLOW_TRACKING_URI, …).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from contracts.errors import InputError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

ReportTo = Literal["none", "tensorboard", "wandb", "mlflow"]
PROJECT = "product-price"
"""What wandb calls the project and MLflow the experiment that holds all runs."""


def require_tracker(report_to: str) -> None:
    """Raise InputError for a tracker whose package is not installed."""
    if report_to == "none":
        return
    from accelerate.tracking import get_available_trackers

    if report_to not in [str(name) for name in get_available_trackers()]:
        raise InputError(f"--report-to {report_to}: the package is not installed; pip install {report_to}")


def start_tracker(report_to: str, folder: Path, run_name: str, settings: dict[str, Any]) -> GeneralTracker:
    """Begin a run of this tracker and hand it the settings.

    Only the first process may call it: the others have nothing to report.

    Args:
        report_to: one of ReportTo, except none.
        folder: run folder, in which TensorBoard writes.
        run_name: what the tracker calls the run.
        settings: of the run, as plain JSON values.

    Raises:
        InputError: the package is missing, or the tracker cannot start (no login, no connection).
    """
    require_tracker(report_to)
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": folder},
        "wandb": {"run_name": PROJECT, "name": run_name},
        "mlflow": {"experiment_name": PROJECT, "run_name": run_name},
    }
    PartialState()  # the trackers' own log messages need it, and not every stage has an Accelerator
    try:
        tracker = LOGGER_TYPE_TO_CLASS[report_to](**arguments[report_to])
        tracker.start()
        tracker.store_init_configuration({name: _plain(value) for name, value in settings.items()})
    except Exception as error:  # each package raises types of its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--report-to {report_to}: it does not start ({reason})") from None
    return tracker


def _plain(value: Any) -> bool | int | float | str:
    """The value itself where trackers take it, otherwise as text: lists and None."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)
