"""Run every stage in order, from anybody's table to test_out.csv, report.html and saved models.

    python -m pipeline.run --data FOLDER --workspace OUT --preset cpu

Each stage is a process of its own. Its command is printed before it runs and can be repeated by hand.

With --resume a stage is skipped if nothing it depends on has changed since it ran: its settings, the content of the
files it reads, and the content of the files it wrote. So a new test.csv is prepared, embedded and priced again, and
no model of the old training table is trained again. A training that was interrupted continues where it stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from contracts.errors import EXIT_INTERRUPTED, InputError, run_entry_point
from contracts.workspace import Workspace
from ensemble.saved import Ensemble
from pipeline.resume import Journal
from pipeline.stages import PipelineSettings, Stage, pipeline_stages
from training.settings import parse_settings

EXIT_TERMINATED = 143
"""128 + SIGTERM"""
SECONDS_TO_STOP = 120.0
"""How long a stage that was asked to stop may take for its last step and its checkpoint."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


def run_stages(stages: Sequence[Stage], workspace: Path, *, resume: bool = False) -> None:
    """Run each stage's command and journal cost and files in pipeline.json.

    Args:
        resume: skip the stages that are journalled with the same settings, inputs and outputs, and continue the
            training that was interrupted.

    Raises:
        InputError: a stage failed; the message names it.
    """
    journal = Journal(workspace, resume=resume)
    for number, stage in enumerate(stages, start=1):
        place = f"[{number}/{len(stages)}]"
        before = journal.before(stage)
        if journal.is_current(stage, before):
            print(f"{place} {stage.name}: nothing has changed since it ran", flush=True)
            journal.keep(stage)
            continue
        continues = journal.can_continue(before)
        command = stage.command(workspace, resume=continues)
        print(f"\n{place} python {' '.join(command[1:])}", flush=True)
        if continues:
            print("it was interrupted, and continues where it stopped", flush=True)
        journal.start(stage, before)
        seconds, peak_mb, exit_code = _run(command)
        if exit_code != 0:
            raise InputError(
                f"stage {stage.module} failed (exit code {exit_code}); --resume continues from here"
            )
        journal.finish(stage, before, seconds=seconds, peak_mb=peak_mb)
    journal.close()


def _run(command: list[str]) -> tuple[float, int, int]:
    """Run a command; returns its wall time in seconds, its peak memory in MB and its exit code.

    A stage does not outlive the pipeline: a second call would train into the same folder.
    """
    started = time.monotonic()
    with stopped_by_sigterm():
        process = subprocess.Popen(command)
        try:
            # unlike process.wait(), this tells the memory of this very process
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return time.monotonic() - started, usage.ru_maxrss // 1024, process.returncode


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM raises Terminated, so that the running stage is asked to stop as well."""

    def stop(signal_number: int, frame: object) -> None:
        raise Terminated

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def describe_outcome(root: Path) -> str:
    """Where the saved model and its prices are, the honest score of both, and how to price another table."""
    workspace = Workspace(root)
    folder = workspace.path("run", name="ensemble")
    lines = [f"model       {folder}: {Ensemble.load(folder).expected_error}"]
    if workspace.path("prepared", split="test").is_file():
        intervals = workspace.path("intervals").name
        lines.append(f"submission  {workspace.path('submission')} and {intervals}: the prices of this model")
    lines.append(f"more        python -m pricing.predict --model {root} --input TABLE --output PRICES")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(PipelineSettings, argv, description=__doc__.split("\n")[0])
    from pipeline.report import write_report
    from pipeline.scores import write_scores

    stages = pipeline_stages(settings)
    try:
        run_stages(stages, settings.workspace, resume=settings.resume)
    except KeyboardInterrupt as reason:
        print("\ninterrupted; --resume (RESUME=1 with make) continues from here", file=sys.stderr)
        sys.exit(EXIT_TERMINATED if isinstance(reason, Terminated) else EXIT_INTERRUPTED)
    print("\n" + write_scores(settings.workspace))
    print(f"\nreport      {write_report(settings.workspace)}")
    print(describe_outcome(settings.workspace))


if __name__ == "__main__":
    run_entry_point(main)
