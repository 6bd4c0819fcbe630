"""Every stage in order, from a folder with train.csv and test.csv to test_out.csv and report.html.

    python -m pipeline.run --data FOLDER --workspace OUT --preset tiny

Each stage is a process of its own: the command is printed before it runs and can be repeated by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contracts.errors import InputError, run_entry_point
from contracts.files import read_json, write_json
from contracts.workspace import REPOSITORY, Workspace
from training.settings import parse_settings


@dataclass
class PipelineSettings:
    data: str = "data/sample"
    """Folder with train.csv, test.csv and optionally images/."""
    workspace: Path = REPOSITORY
    """Folder that receives every artefact."""
    preset: Literal["base", "tiny"] = "base"
    """base: the real checkpoints; tiny: the same classes small and with random weights, for a CPU."""
    download: bool = False
    """Fetch the pictures that are not in the images folder yet."""
    resume: bool = False
    """Skip the commands that an earlier, interrupted call has finished."""


def commands(settings: PipelineSettings) -> list[list[str]]:
    """The stages as module and arguments, in order."""
    preset = ["--preset", settings.preset]
    download = [["data.download_images"]] if settings.download else []
    return [
        ["data.prepare", "--data", settings.data],
        *download,
        ["clip_finetune.train", *preset],
        ["clip_finetune.extract_embeddings", "train"],
        ["clip_finetune.extract_embeddings", "test"],
        ["siglip_extract.extract_embeddings", "train", *preset],
        ["siglip_extract.extract_embeddings", "test", *preset],
        ["qwen3_finetune.train", *preset],
        ["qwen3_finetune.extract_embeddings", "train"],
        ["qwen3_finetune.extract_embeddings", "test"],
        ["fusion.all_embeddings.train", *preset],
        ["fusion.all_embeddings.predict_test"],
    ]


def run_stages(stages: list[list[str]], workspace: Path, *, resume: bool = False) -> None:
    """Run `python -m <stage> --workspace <workspace>` for each; time and peak memory go to pipeline.json.

    Raises InputError naming the stage that failed. With `resume`, stages that are in pipeline.json are skipped.
    """
    journal = Workspace(workspace).path("stages")
    done = read_json(journal) if resume and journal.is_file() else []
    finished = [entry["stage"] for entry in done]
    for number, (module, *arguments) in enumerate(stages, 1):
        stage = " ".join([module, *arguments])
        command = [sys.executable, "-m", module, *arguments, "--workspace", str(workspace)]
        if stage in finished:
            print(f"[{number}/{len(stages)}] {stage}: done before", flush=True)
            continue
        print(f"\n[{number}/{len(stages)}] python {' '.join(command[1:])}", flush=True)
        started = time.monotonic()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise InputError(
                f"stage {module} failed (exit code {process.returncode}); --resume goes on from here"
            )
        done.append(
            {
                "stage": stage,
                "seconds": round(time.monotonic() - started, 1),
                "peak_mb": usage.ru_maxrss // 1024,
            }
        )
        write_json(journal, done)


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(PipelineSettings, argv, description=__doc__.split("\n")[0])
    workspace = settings.workspace
    run_stages(commands(settings), workspace, resume=settings.resume)
    from pipeline.report import write_report
    from pipeline.scores import write_scores

    print("\n" + write_scores(workspace))
    print(f"\n{write_report(workspace)}\n{Workspace(workspace).path('submission')}")


if __name__ == "__main__":
    run_entry_point(main)
