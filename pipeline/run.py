"""Run every stage in order, from anybody's table to test_out.csv, report.html and saved models.

    python -m pipeline.run --data FOLDER --workspace OUT --preset cpu

Each stage is a process of its own. Its command is printed before it runs and can be repeated by hand.

With --resume a stage is skipped if nothing it depends on has changed since it ran: its command, the content of the
files it reads, and the content of the files it wrote. So a new test.csv is prepared, embedded and priced again, and
no model of the old training table is trained again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from contracts.errors import InputError, run_entry_point
from contracts.files import read_json, sha256_file, write_json
from contracts.workspace import Workspace
from pipeline.stages import PipelineSettings, Stage, pipeline_stages
from training.settings import parse_settings


def run_stages(stages: Sequence[Stage], workspace: Path, *, resume: bool = False) -> None:
    """Run `python -m <stage> --workspace <workspace>` for each stage and journal cost and files in pipeline.json.

    Args:
        resume: skip the stages that are journalled with the same command, inputs and outputs. A stage that declares
            neither files it reads nor files it writes is skipped by its command alone.

    Raises:
        InputError: a stage failed; the message names it.
    """
    journal = Workspace(workspace).path("stages")
    earlier = {entry["stage"]: entry for entry in read_json(journal)} if resume and journal.is_file() else {}
    entries = []
    for number, stage in enumerate(stages, start=1):
        place = f"[{number}/{len(stages)}]"
        if is_current(stage, earlier.get(stage.name), workspace):
            print(f"{place} {stage.name}: nothing has changed since it ran", flush=True)
            entries.append(earlier[stage.name])
            continue
        command = ["-m", stage.module, *stage.arguments, "--workspace", str(workspace)]
        print(f"\n{place} python {' '.join(command)}", flush=True)
        read = contents(
            workspace, stage.reads
        )  # before it runs: what changes meanwhile must count as changed
        seconds, peak_mb, exit_code = _run([sys.executable, *command])
        if exit_code != 0:
            raise InputError(
                f"stage {stage.module} failed (exit code {exit_code}); --resume continues from here"
            )
        entries.append(
            {
                "stage": stage.name,
                "seconds": round(seconds, 1),
                "peak_mb": peak_mb,
                "read": read,
                "wrote": contents(workspace, stage.writes),
            }
        )
        # stages of an earlier call that come later in the list are kept: they may still be current
        done = {entry["stage"] for entry in entries}
        write_json(journal, entries + [entry for name, entry in earlier.items() if name not in done])


def is_current(stage: Stage, entry: dict | None, workspace: Path) -> bool:
    """Whether the stage ran before with these very inputs and its outputs are still what it wrote."""
    if entry is None:
        return False
    if not stage.reads and not stage.writes:
        return True
    read, wrote = contents(workspace, stage.reads), contents(workspace, stage.writes)
    return bool(wrote) and read == entry.get("read") and wrote == entry.get("wrote")


def contents(workspace: Path, patterns: Sequence[str]) -> dict[str, str]:
    """sha256 of every file that the patterns match, by path."""
    files = set()
    for pattern in patterns:
        if Path(pattern).is_absolute():
            files.add(Path(pattern))
        else:
            files.update(workspace.glob(pattern))
    return {str(file): sha256_file(file) for file in sorted(files) if file.is_file()}


def _run(command: list[str]) -> tuple[float, int, int]:
    """Run a command; returns its wall time in seconds, its peak memory in MB and its exit code."""
    started = time.monotonic()
    process = subprocess.Popen(command)
    # unlike process.wait(), this tells the memory of this very process
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return time.monotonic() - started, usage.ru_maxrss // 1024, process.returncode


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(PipelineSettings, argv, description=__doc__.split("\n")[0])
    from pipeline.report import write_report
    from pipeline.scores import write_scores

    run_stages(pipeline_stages(settings), settings.workspace, resume=settings.resume)
    print("\n" + write_scores(settings.workspace))
    print(f"\nreport      {write_report(settings.workspace)}")
    submission = Workspace(settings.workspace).path("submission")
    if submission.is_file():
        print(f"submission  {submission}")


if __name__ == "__main__":
    run_entry_point(main)
