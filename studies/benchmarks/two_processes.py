"""Are two processes twice as fast as one? Extraction and training, one thread each, under torchrun on this machine.

    python -m studies.benchmarks.two_processes --quick

efficiency = time of one / (2 × time of two), for the same rows and the same updates. Timed is the work alone: an
extraction from dealing the shards to the joined file, a training the epochs after the first, evaluation included;
starting Python, importing and loading are not. Gradients cross once an update, so the size of the model and of the
update decide: trained are all-MiniLM-L6-v2 with LoRA (--encoder), CLIP (--clip) on 128 pictures an update, and the
specified fusion at batches of 1024 and 4096.
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
from pathlib import Path

from contracts.errors import run_entry_point
from contracts.files import read_json, write_json
from data import prepare
from studies.benchmarks.growth import encoders, write_catalogue, write_random_embeddings
from studies.benchmarks.measure import RESULTS, report
from training.extraction import ShardedExtraction
from training.run_folder import RunFolder
from training.settings import parse_settings

EXTRACTED = "two_processes"
"""name of the embedding file"""


@dataclass
class TwoProcessesSettings:
    quick: bool = False
    """small tables and one round: does it run?"""
    rows: int = 10_000
    """rows to embed, with tiny encoders"""
    train_rows: int = 1000
    """rows of the table that encoders are trained on"""
    fusion_rows: int = 20_000
    """rows of the table that fusion is trained on"""
    encoder: str = ""
    """folder or hub id of the text encoder to train; empty: the tiny one, all weights"""
    clip: str = "ViT-S-32-alt"
    """architecture of the CLIP to train, with random weights"""
    epochs: int = 2
    """epochs of a training; the first is not timed"""
    rounds: int = 3
    """times that each measurement is made; the median counts"""
    work: tuple[str, ...] = ()
    """what to measure, such as "qwen3_finetune training"; empty: all"""
    data: str = ""
    """folder with a train.csv whose texts are repeated; empty: texts of the generated catalogue"""
    out: str = str(RESULTS / "two_processes.json")
    """json file to write"""


@dataclass
class Contest:
    """One stage; `alone` and `shared` are flags by which one and two processes do the same work."""

    name: str
    module: str
    flags: Sequence[str]
    alone: Sequence[str] = ()
    shared: Sequence[str] = ()
    of_fusion: bool = False
    """reads the workspace with embeddings in place of encoders"""


def contests(settings: TwoProcessesSettings) -> list[Contest]:
    epochs = ["--epochs", str(settings.epochs)]
    tiny = ["--preset", "tiny", *epochs]
    lora = ["--model", settings.encoder, "--no-random-weights", "--train", "lora"] if settings.encoder else []
    return [
        # the devices share the batches of an update
        Contest("qwen3_finetune training", "qwen3_finetune.train", [*tiny, *lora, "--batch-size", "32"],
                alone=["--grad-accum", "2"], shared=["--grad-accum", "1"]),
        # an update's pictures are dealt to the processes
        Contest("clip_finetune training", "clip_finetune.train", [*tiny, "--model", settings.clip, "--random-weights"],
                alone=["--batch-size", "128"], shared=["--batch-size", "64"]),
        *(Contest(f"fusion training, batch {size}", "fusion.all_embeddings.train",
                  [*epochs, "--batch-size", str(size)], of_fusion=True) for size in (1024, 4096)),
        Contest("qwen3_finetune extraction", "qwen3_finetune.extract_embeddings", ["test", "--name", EXTRACTED]),
        Contest("clip_finetune extraction", "clip_finetune.extract_embeddings", ["test", "--name", EXTRACTED]),
    ]  # fmt: skip


def run(contest: Contest, workspace: Path, processes: int) -> float:
    """Seconds of the timed part."""
    for file in (workspace / "data" / "embeddings").glob(f"{EXTRACTED}_*"):
        file.unlink()
    times = workspace / "times.json"
    flags = [*contest.flags, *(contest.alone if processes == 1 else contest.shared)]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "studies.benchmarks.two_processes"]
    command += ["--"] if processes > 1 else []  # torchrun would take a --run for its --run-path
    command += ["work", contest.module, str(times), *flags, "--device", "cpu", "--workspace", str(workspace)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    marks = read_json(times)
    times.unlink()
    return statistics.median(after - before for before, after in zip(marks, marks[1:], strict=False))


def work(module: str, times: str, *flags: str) -> None:
    """One process of a run: the stage's own main, with the clock read where the timed parts begin and end."""
    marks: list[float] = []

    def read_clock_after(owner: type, name: str, wanted: str = "") -> None:
        method = getattr(owner, name)

        def timed(self, *args, **values):
            result = method(self, *args, **values)
            if not wanted or wanted in values:
                marks.append(time.perf_counter())
            return result

        setattr(owner, name, timed)

    read_clock_after(ShardedExtraction, "pending")
    read_clock_after(ShardedExtraction, "finish")
    read_clock_after(RunFolder, "log", "stop/smape")  # once an epoch
    import_module(module).main(list(flags))
    if int(os.environ.get("RANK", 0)) == 0:
        write_json(times, marks)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["work"]:
        work(*argv[1:])
        return
    settings = parse_settings(TwoProcessesSettings, argv, description=__doc__.split("\n")[0])
    if settings.quick:
        settings.rows, settings.train_rows, settings.fusion_rows, settings.rounds = 600, 300, 2000, 1
        settings.clip = "tiny"
    rows = []
    with tempfile.TemporaryDirectory(prefix="two_processes") as folder:
        with_encoders, of_fusion = Path(folder, "encoders"), Path(folder, "fusion")
        encoders(with_encoders, settings.train_rows, settings.rows, settings.data)
        write_catalogue(of_fusion / "catalogue", settings.fusion_rows, 100, settings.data)
        prepare.main(["--data", str(of_fusion / "catalogue"), "--workspace", str(of_fusion)])
        write_random_embeddings(of_fusion, width=1024)
        for contest in contests(settings):
            workspace = of_fusion if contest.of_fusion else with_encoders
            if settings.work and contest.name not in settings.work:
                continue
            seconds: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(settings.rounds):  # in turns: a machine that slows down slows both
                for processes, found in seconds.items():
                    found.append(run(contest, workspace, processes))
            one, two = (statistics.median(found) for found in seconds.values())
            rows.append(
                {"work": contest.name, "seconds_one": one, "seconds_two": two, "efficiency": one / (2 * two)}
            )
            print(rows[-1], flush=True)
    report(settings.out, rows)


if __name__ == "__main__":
    run_entry_point(main)
