"""Are two processes twice as fast as one? Extraction and training, with one thread each, under torchrun.

    python -m studies.benchmarks.two_processes --quick

efficiency = time of one process / (2 × time of two), for the same rows and the same updates. Only the work itself is
timed. An extraction is timed from dealing the shards to the joined file, and a training from the end of its first epoch
to the end of its last, evaluation included. Starting Python, importing and loading do not count.

Gradients cross once per update, so the size of the model and of the update decide. The trained models are
all-MiniLM-L6-v2 with LoRA (--encoder), CLIP (--clip) with 128 pictures per update, and the full-size fusion at batches
of 1024 and 4096.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from contracts.errors import InputError, run_entry_point
from contracts.files import read_json, write_json
from studies.benchmarks.growth import encoders, prepared, write_catalogue, write_random_embeddings
from studies.tables import RESULTS
from training.settings import parse_settings

WORK = "work"
"""First argument that turns this module into one process of a run (see `work`)."""
EXTRACTED = "two_processes"
"""Name of the embedding file that extractions write."""
FUSION_WIDTH = 1024
FUSION_TEST_ROWS = 100


@dataclass
class TwoProcessesSettings:
    quick: bool = False
    """Use small tables and one round, to see that it runs."""
    rows: int = 10_000
    """Rows to embed, with tiny encoders."""
    train_rows: int = 1000
    """Rows of the table that encoders are trained on."""
    fusion_rows: int = 20_000
    """Rows of the table that fusion is trained on."""
    encoder: str = ""
    """Folder or hub id of the text encoder to train; empty means the tiny one with all its weights."""
    clip: str = "ViT-S-32-alt"
    """Architecture of the CLIP to train, with random weights."""
    epochs: int = 2
    """Epochs of a training; the first is not timed."""
    rounds: int = 3
    """Times that each measurement is made; the median counts."""
    work: tuple[str, ...] = ()
    """What to measure, such as "qwen3_finetune training"; empty means all."""
    data: str = ""
    """Folder with a train.csv whose texts are repeated; empty means texts of the generated catalogue."""
    out: Path = RESULTS / "two_processes.json"
    """Json file to write."""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows = 600
            self.train_rows = 300
            self.fusion_rows = 2000
            self.rounds = 1
            self.clip = "tiny"


@dataclass
class Contest:
    """One stage, as one process and as two."""

    name: str
    module: str
    flags: Sequence[str]
    alone: Sequence[str] = ()
    """Further flags for one process."""
    shared: Sequence[str] = ()
    """Further flags for two processes, by which both do the same work."""
    reads_embeddings: bool = False
    """It runs on the workspace with random embeddings, not on the one with encoders."""


def contests(settings: TwoProcessesSettings) -> list[Contest]:
    """All contests, or those that --work names."""
    epochs = ["--epochs", str(settings.epochs)]
    tiny = ["--preset", "tiny", *epochs]
    encoder = (
        ["--model", settings.encoder, "--no-random-weights", "--train", "lora"] if settings.encoder else []
    )
    clip = ["--model", settings.clip, "--random-weights"]
    fusion_at = "fusion.all_embeddings.train"
    found = [
        # here the processes share the micro-batches of an update
        Contest(
            "qwen3_finetune training", "qwen3_finetune.train", [*tiny, *encoder, "--batch-size", "32"],
            alone=["--gradient-accumulation-steps", "2"], shared=["--gradient-accumulation-steps", "1"],
        ),
        # here the pictures of an update are dealt to the processes
        Contest(
            "clip_finetune training", "clip_finetune.train", [*tiny, *clip],
            alone=["--batch-size", "128"], shared=["--batch-size", "64"],
        ),
        Contest("fusion training, batch 1024", fusion_at, [*epochs, "--batch-size", "1024"], reads_embeddings=True),
        Contest("fusion training, batch 4096", fusion_at, [*epochs, "--batch-size", "4096"], reads_embeddings=True),
        Contest(
            "qwen3_finetune extraction", "qwen3_finetune.extract_embeddings", ["test", "--embedding", EXTRACTED]
        ),
        Contest("clip_finetune extraction", "clip_finetune.extract_embeddings", ["test", "--embedding", EXTRACTED]),
    ]  # fmt: skip
    names = [contest.name for contest in found]
    if unknown := set(settings.work) - set(names):
        raise InputError(f"--work {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    return [contest for contest in found if not settings.work or contest.name in settings.work]


def run(contest: Contest, workspace: Path, processes: int) -> float:
    """Run the contest with this many processes; returns the seconds of its timed part."""
    for file in (workspace / "data" / "embeddings").glob(f"{EXTRACTED}_*"):
        file.unlink()
    times = workspace / "times.json"
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launch += ["-m", "studies.benchmarks.two_processes"]
    if processes > 1:
        launch.append("--")  # torchrun would take a --run for its --run-path
    flags = [*contest.flags, *(contest.alone if processes == 1 else contest.shared)]
    command = [
        *launch,
        WORK,
        contest.module,
        str(times),
        *flags,
        "--device",
        "cpu",
        "--workspace",
        str(workspace),
    ]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    marks = read_json(times)
    times.unlink()
    return statistics.median(after - before for before, after in pairwise(marks))


def work(module: str, times: str, *flags: str) -> None:
    """One process of a run: the stage's own main. The clock is read where the timed parts begin and end."""
    from training.extraction import ShardedExtraction
    from training.run_folder import RunFolder

    marks: list[float] = []

    def read_clock_after(owner: type, name: str, keyword: str = "") -> None:
        """Read the clock after each call of this method, or only after those with this keyword argument."""
        method = getattr(owner, name)

        def timed(self, *positional, **named):
            result = method(self, *positional, **named)
            if not keyword or keyword in named:
                marks.append(time.perf_counter())
            return result

        setattr(owner, name, timed)

    read_clock_after(ShardedExtraction, "pending")
    read_clock_after(ShardedExtraction, "finish")
    read_clock_after(RunFolder, "log", keyword="stop/smape")  # once per epoch
    import_module(module).main(list(flags))
    if int(os.environ.get("RANK", 0)) == 0:
        write_json(times, marks)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [WORK]:
        work(*argv[1:])
        return
    settings = parse_settings(TwoProcessesSettings, argv, description=__doc__.split("\n")[0])
    planned = contests(settings)
    from studies.benchmarks.measure import in_one_line, report

    rows = []
    with tempfile.TemporaryDirectory(prefix="two_processes") as folder:
        with_encoders = Path(folder) / "encoders"
        encoders(with_encoders, settings.train_rows, settings.rows, settings.data)
        with_embeddings = Path(folder) / "fusion"
        write_catalogue(with_embeddings / "catalogue", settings.fusion_rows, FUSION_TEST_ROWS, settings.data)
        prepared(with_embeddings)
        write_random_embeddings(with_embeddings, FUSION_WIDTH)

        for contest in planned:
            workspace = with_embeddings if contest.reads_embeddings else with_encoders
            of_one = []
            of_two = []
            for _ in range(settings.rounds):  # in turns: a machine that slows down slows both down
                of_one.append(run(contest, workspace, processes=1))
                of_two.append(run(contest, workspace, processes=2))
            one = statistics.median(of_one)
            two = statistics.median(of_two)
            row = {
                "work": contest.name,
                "seconds_one": one,
                "seconds_two": two,
                "efficiency": one / (2 * two),
            }
            print(in_one_line(row), flush=True)
            rows.append(row)
    report(settings.out, rows)


if __name__ == "__main__":
    run_entry_point(main)
