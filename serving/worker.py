"""The process that prices uploaded tables, and who starts it.

    python -m serving.worker --model OUT --jobs OUT/jobs

The service starts it when there is something to do. It takes the oldest job, prices 1,024 rows at a time, and keeps
each such part in a file of its own. Whenever it is killed, its successor goes on behind the last part.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from contracts.catalog import ColumnMapping
from contracts.errors import InputError, run_entry_point
from contracts.files import write_json
from contracts.tables import DELIMITERS, iterate_table, table_format, table_writer, without_formulas
from serving.config import PriceServiceSettings
from serving.jobs import CHUNK_ROWS, LISTED_BAD_ROWS, MOST_STARTS, SCHEMA, Job, JobStore
from training.settings import parse_settings

if TYPE_CHECKING:
    from pricing.model import PriceModel

ROWS_AT_ONCE = 128
"""Rows between two looks at whether the job is still wanted."""
IDLE_SECONDS = 60.0
"""A worker without a job ends after this time, and gives its memory back."""
POLL_SECONDS = 0.5
WAIT_AFTER_CRASH = 10.0
NICENESS = 10
"""Single products come first."""
LONGEST_ID = 80
PRICES = ("price", "low_80", "high_80", "low_95", "high_95")

log = logging.getLogger("serving.worker")


class Unwanted(Exception):
    """The job was removed, or the service has ended."""


@dataclass
class WorkerSettings:
    """Settings of worker.py."""

    model: str = "."
    """Workspace, exported folder or hub id of the saved system."""
    jobs: Path = Path("jobs")
    """Folder of the jobs."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:<number>."""
    threads: int = 1
    """CPU threads of the model."""
    max_text_characters: int = 20_000
    """Longest text of a product; a row with a longer one gets no price."""
    job_days: float = 7.0
    """Days that a finished job is kept."""


class Worker:
    """Prices one job after the other."""

    def __init__(self, model: PriceModel, fingerprint: str, settings: WorkerSettings):
        self.model = model
        self.fingerprint = fingerprint
        self.settings = settings
        self.parent = os.getppid()

    def run(self, job: Job) -> None:
        """Go on with a job until it is done or has failed.

        Raises:
            Unwanted: it was removed meanwhile, or the service has ended.
        """
        try:
            about = job.about
            if (about.get("schema"), about.get("model")) != (SCHEMA, self.fingerprint):
                raise InputError("the model was changed while the job was waiting; upload the table again")
            note_start(job)
            if not (job.folder / "counted.json").is_file():
                rows = sum(len(piece) for piece in self._wanted(job, iterate_table(job.input)))
                self._require_wanted(job)
                if rows == 0:
                    raise InputError("file: the table has no rows")
                write_json(job.folder / "counted.json", {"rows": rows})
            self._price_parts(job)
            self._require_wanted(job)
            write_result(job)
        except (InputError, zlib.error) as error:  # zlib's: a damaged .gz
            self._require_wanted(job)
            # the file's name on this machine means nothing to the client
            job.fail(str(error).replace(str(job.input), "file")[:300])

    def _price_parts(self, job: Job) -> None:
        done = job.parts
        progress = Progress.of(job)
        progress.write(job)
        pieces = islice(enumerate(iterate_table(job.input, CHUNK_ROWS)), done, None)
        for number, piece in pieces:
            priced = self._price(job, piece, progress)
            self._require_wanted(job)
            with table_writer(job.part(number)) as writer:
                writer.write(priced)
            progress.add(priced)
            progress.write(job)

    def _price(self, job: Job, piece: pd.DataFrame, progress: Progress) -> pd.DataFrame:
        """sample_id, the prices, `missing` and `problem` of each row."""
        mapping = self.model.mapping
        table = mapped_columns(piece, mapping)
        result = pd.DataFrame({"sample_id": table[mapping.id].str.strip()})
        for name in PRICES:
            result[name] = np.nan
        result["missing"] = ""
        result["problem"] = problems_of(table, mapping, self.settings.max_text_characters)
        good = np.flatnonzero(result["problem"] == "")
        for start in range(0, len(good), ROWS_AT_ONCE):
            self._price_rows(table, good[start : start + ROWS_AT_ONCE], result)
            self._require_wanted(job)
            progress.write(job, begun=min(start + ROWS_AT_ONCE, len(good)))
        return result

    def _price_rows(self, table: pd.DataFrame, rows: np.ndarray, result: pd.DataFrame) -> None:
        """Fill in the prices of some rows; a row that the model refuses gets a problem instead."""
        try:
            prices = self.model.predict(table.iloc[rows])
        except Exception as error:
            if len(rows) > 1:
                for row in rows:
                    self._price_rows(table, np.array([row]), result)
                return
            if not isinstance(error, InputError):
                log.exception("the model failed")
            reason = str(error)[:200] if isinstance(error, InputError) else "the model could not price it"
            result.loc[rows, "problem"] = reason
            return
        for name in (*PRICES, "missing"):
            result.loc[rows, name] = prices[name].to_numpy()

    def _wanted(self, job: Job, pieces: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for piece in pieces:
            self._require_wanted(job)
            yield piece

    def _require_wanted(self, job: Job) -> None:
        if not job.exists or os.getppid() != self.parent:
            raise Unwanted


def mapped_columns(piece: pd.DataFrame, mapping: ColumnMapping) -> pd.DataFrame:
    """Only the columns of the model. A table that looks like a prepared one could name pictures outside the folder."""
    names = [mapping.id, *mapping.text, *mapping.features]
    if mapping.image:
        names.append(mapping.image)
    return piece.reindex(columns=names, fill_value="").reset_index(drop=True)


def problems_of(table: pd.DataFrame, mapping: ColumnMapping, most_characters: int) -> list[str]:
    """Why each row cannot be priced; "" where it can."""
    problems = []
    texts = table[list(mapping.text)].agg("\n".join, axis=1)
    for sample_id, text in zip(table[mapping.id], texts, strict=True):
        problem = ""
        if not sample_id.strip():
            problem = f"its {mapping.id} is empty"
        elif not text.strip():
            problem = "it has no text"
        elif len(text) > most_characters:
            problem = f"its text has {len(text)} characters; at most {most_characters} are allowed"
        elif any("\ud800" <= character <= "\udfff" for character in text):
            problem = "its text holds half of a surrogate pair, which is not text"
        problems.append(problem)
    return problems


@dataclass
class Progress:
    """What the finished parts of a job hold."""

    rows: int
    bad_rows: list[dict[str, Any]]
    bad_rows_total: int
    started: float
    """monotonic seconds, of this worker"""
    rows_before: int
    """rows that earlier workers have priced"""

    @classmethod
    def of(cls, job: Job) -> Progress:
        progress = cls(0, [], 0, time.monotonic(), 0)
        for number in range(job.parts):
            progress.add(pd.read_parquet(job.part(number)))
        progress.rows_before = progress.rows
        return progress

    def add(self, priced: pd.DataFrame) -> None:
        bad = np.flatnonzero(priced["problem"] != "")
        for row in bad[: LISTED_BAD_ROWS - len(self.bad_rows)]:
            self.bad_rows.append(
                {
                    "row": self.rows + int(row) + 1,
                    "id": priced["sample_id"].iloc[row][:LONGEST_ID],
                    "reason": priced["problem"].iloc[row],
                }
            )
        self.bad_rows_total += len(bad)
        self.rows += len(priced)

    def write(self, job: Job, *, begun: int = 0) -> None:
        """`begun`: rows of the present part that are priced, too, and would be priced again after a kill."""
        seconds = time.monotonic() - self.started
        rows = self.rows + begun
        content = {
            "rows": rows,
            "bad_rows": self.bad_rows,
            "bad_rows_total": self.bad_rows_total,
            "rows_per_second": (rows - self.rows_before) / seconds if seconds else 0,
            "at": time.time(),
        }
        write_json(job.folder / "progress.json", content)


def note_start(job: Job) -> None:
    """Count the starts at the present part. Raises InputError where it has ended too many workers."""
    earlier = job.read("started.json")
    starts = earlier.get("starts", 0) + 1 if earlier.get("part") == job.parts else 1
    if starts > MOST_STARTS:
        first = job.parts * CHUNK_ROWS + 1
        raise InputError(
            f"the worker ended {MOST_STARTS} times at rows {first} to {first + CHUNK_ROWS - 1}; "
            "look for very long texts there, or give the service more memory"
        )
    write_json(job.folder / "started.json", {"part": job.parts, "starts": starts})


def write_result(job: Job) -> None:
    """Join the parts. In formats that spreadsheets open, no cell is taken for a formula."""
    is_text = table_format(job.result) in DELIMITERS
    with table_writer(job.result) as writer:
        for number in range(job.parts):
            part = pd.read_parquet(job.part(number))
            writer.write(without_formulas(part) if is_text else part)


@contextmanager
def only_one(root: Path) -> Iterator[bool]:
    """Whether this is the only worker of the folder; the lock goes with the process, however it ends."""
    with open(root / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class Supervisor:
    """Starts a worker when there is something to do. Runs in the service."""

    def __init__(self, store: JobStore, settings: PriceServiceSettings):
        self.store = store
        self.command = [
            sys.executable, "-m", "serving.worker", "--model", str(settings.model), "--jobs", str(store.root),
            "--device", settings.device, "--threads", str(settings.worker_threads),
            "--max-text-characters", str(settings.max_text_characters), "--job-days", str(settings.job_days),
        ]  # fmt: skip
        self.process: subprocess.Popen | None = None
        self.not_before = 0.0
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            await asyncio.to_thread(self.process.wait)

    async def _watch(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._look)
            except OSError:
                log.exception("the folder of the jobs cannot be used")
            await asyncio.sleep(POLL_SECONDS)

    def _look(self) -> None:
        if self.process is not None and (code := self.process.poll()) is not None:
            self.process = None
            if code != 0:
                log.warning("a worker ended with code %d", code)
                self.not_before = time.monotonic() + WAIT_AFTER_CRASH
        if self.process is not None or time.monotonic() < self.not_before or not self.store.unfinished():
            return
        # another service may share the folder
        with only_one(self.store.root) as is_only:
            pass
        if is_only:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)


def work(settings: WorkerSettings) -> None:
    """Price jobs until there has been none for a while."""
    store = JobStore(settings.jobs)
    with only_one(store.root) as is_only:
        if not is_only:
            return
        os.nice(NICENESS)
        store.remove_expired(settings.job_days)
        worker = open_worker(settings)
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < IDLE_SECONDS and os.getppid() == worker.parent:
            jobs = store.unfinished()
            if not jobs:
                time.sleep(POLL_SECONDS)
                continue
            try:
                worker.run(jobs[0])
            except (Unwanted, FileNotFoundError):
                if jobs[0].exists and os.getppid() == worker.parent:
                    raise
            idle_since = time.monotonic()


def open_worker(settings: WorkerSettings) -> Worker:
    import torch

    from pricing.model import PriceModel

    torch.set_num_threads(settings.threads)
    model = PriceModel.load(settings.model, device=settings.device)
    return Worker(model, fingerprint_of(model), settings)


def fingerprint_of(model: PriceModel) -> str:
    """Changes when the ensemble is fitted again."""
    from contracts.files import sha256_file
    from ensemble.saved import FILE
    from pricing.model import ENSEMBLE

    return sha256_file(model.workspace.path("run", name=ENSEMBLE) / FILE)


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(WorkerSettings, argv, description=__doc__.split("\n")[0])
    os.environ.setdefault("TQDM_DISABLE", "1")
    work(settings)


if __name__ == "__main__":
    run_entry_point(main)
