"""Catalogues that are priced in the background: the folders of their jobs, and the endpoints.

    <jobs>/<id>/job.json        what was uploaded; the folder is a job once this file is there
                input.csv       the table, under a name of ours
                counted.json    number of its rows
                parts/          prices of 1,024 rows each; a part is either complete or absent
                progress.json   what the parts hold, for the status
                result.csv      all prices; appears when the job is done
                failed.json     why there will be none

A job's state follows from these files alone. So a process may be killed at any time, and any process that sees the
folder can tell the state or go on (`serving.worker`).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal, get_args

from fastapi import APIRouter, HTTPException, Request
from fastapi import Path as PathParameter
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, Response

from contracts.catalog import ColumnMapping
from contracts.errors import InputError
from contracts.files import write_json
from contracts.tables import DELIMITERS, table_format
from serving.app import GUARDED, Service, problems
from serving.config import PriceServiceSettings
from serving.limits import MULTIPART, QUOTED, read_form
from serving.schemas import BadRow, JobResponse

SCHEMA = 1
CHUNK_ROWS = 1024
LISTED_BAD_ROWS = 100
LONGEST_HEAD = 1 << 20
"""Bytes in which the first line of a table has to end."""
ID = re.compile(r"[0-9a-f]{32}")
UPLOAD, REMOVED = ".upload-", ".removed-"
"""How folders begin that are not yet jobs, or no longer."""
STALE_SECONDS = 24 * 3600
MOST_STARTS = 5
"""Times that a part may end the process that prices it before the job is given up."""
FILE = "file"
NO_JOB = "there is no such job"


State = Literal["queued", "running", "done", "failed"]


@dataclass(frozen=True)
class Job:
    """One folder."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def about(self) -> dict[str, Any]:
        """`schema` of the folder, `created` (seconds since 1970) and `model` (hash of the ensemble)."""
        return self.read("job.json")

    @property
    def endings(self) -> str:
        """Of the uploaded file, such as .csv.gz; the result has the same."""
        found = next(self.folder.glob("input.*"), Path("input"))
        return found.name.removeprefix("input")

    @property
    def input(self) -> Path:
        return self.folder / f"input{self.endings}"

    @property
    def result(self) -> Path:
        return self.folder / f"result{self.endings}"

    def part(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:06d}.parquet"

    @property
    def parts(self) -> int:
        """Number of parts that are done. They are made in order."""
        return len(list((self.folder / "parts").glob("*.parquet")))

    @property
    def exists(self) -> bool:
        """False once the job was removed."""
        return (self.folder / "job.json").is_file()

    @property
    def state(self) -> State:
        if (self.folder / "failed.json").is_file():
            return "failed"
        if self.result.is_file():
            return "done"
        return "running" if (self.folder / "started.json").is_file() else "queued"

    @property
    def is_finished(self) -> bool:
        return self.state in ("done", "failed")

    def fail(self, reason: str) -> None:
        write_json(self.folder / "failed.json", {"error": reason})

    def read(self, name: str) -> dict[str, Any]:
        """One of the small files; empty while it is not there, or when the job was just removed."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def status(self) -> JobResponse:
        state = self.state
        progress = self.read("progress.json")
        rows = self.read("counted.json").get("rows")
        rows_done = progress.get("rows", 0)
        return JobResponse(
            id=self.id,
            state=state,
            rows=rows,
            rows_done=rows_done,
            bad_rows=[BadRow(**bad) for bad in progress.get("bad_rows", [])],
            bad_rows_total=progress.get("bad_rows_total", 0),
            seconds_left=_seconds_left(state, rows, rows_done, progress),
            error=self.read("failed.json").get("error"),
        )


def _seconds_left(state: State, rows: int | None, rows_done: int, progress: dict[str, Any]) -> float | None:
    """From the speed since the worker began; None while nothing is known of it."""
    if state in ("done", "failed"):
        return 0.0
    speed = progress.get("rows_per_second")
    if rows is None or not speed:
        return None
    since = time.time() - progress["at"]
    return round(max(0.0, (rows - rows_done) / speed - since), 1)


class JobStore:
    """All jobs of a folder."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def find(self, job_id: str) -> Job | None:
        job = Job(self.root / job_id)
        return job if ID.fullmatch(job_id) and job.exists else None

    def __iter__(self) -> Iterator[Job]:
        for folder in self.root.iterdir():
            job = Job(folder)
            if ID.fullmatch(job.id) and job.exists:
                yield job

    def unfinished(self) -> list[Job]:
        """Oldest first."""
        waiting = [job for job in self if not job.is_finished]
        return sorted(waiting, key=lambda job: (job.about.get("created", 0), job.id))

    def create(self, name: str, content: IO[bytes], mapping: ColumnMapping, model: str) -> Job:
        """Store an uploaded table.

        Args:
            name: of the uploaded file; only its ending is used.
            content: of the file.
            mapping: columns that the table has to have.
            model: hash of the ensemble that is to price it.

        Raises:
            InputError: the table has a format that is not known, or lacks a column.
        """
        job_id = secrets.token_hex(16)
        upload = self.root / f"{UPLOAD}{job_id}"
        zipped = ".gz" if name.endswith(".gz") else ""
        path = upload / f"input{table_format(name)}{zipped}"
        try:
            upload.mkdir()
            with path.open("wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
            require_columns(path, mapping)
            write_json(upload / "job.json", {"schema": SCHEMA, "created": time.time(), "model": model})
            upload.rename(self.root / job_id)
        except BaseException:
            shutil.rmtree(upload, ignore_errors=True)
            raise
        return Job(self.root / job_id)

    def remove(self, job: Job) -> Path:
        """Take a job away at once; returns its folder under another name, to be deleted."""
        removed = self.root / f"{REMOVED}{job.id}"
        job.folder.rename(removed)
        return removed

    def remove_expired(self, days: float) -> None:
        """Delete jobs that finished so long ago, and what killed processes have left."""
        now = time.time()
        for job in self:
            if job.is_finished and now - job.folder.stat().st_mtime > days * 24 * 3600:
                shutil.rmtree(self.remove(job), ignore_errors=True)
        for folder in self.root.iterdir():
            is_leftover = folder.name.startswith((UPLOAD, REMOVED)) or (
                ID.fullmatch(folder.name) and not Job(folder).exists
            )
            if is_leftover and now - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def required_columns(mapping: ColumnMapping) -> list[str]:
    return [mapping.id, *mapping.text, *mapping.features]


def require_columns(path: Path, mapping: ColumnMapping) -> None:
    """Raises InputError where a table lacks a column; only its head is read, since the table may be large."""
    columns = columns_of(path)
    missing = [name for name in required_columns(mapping) if columns is not None and name not in columns]
    if missing:
        found = ", ".join(columns or [])[: 4 * QUOTED]
        raise InputError(f"{FILE}: column {', '.join(missing)} is missing; found {found}")


def columns_of(path: Path) -> list[str] | None:
    """The columns of a table; None where the format does not name them in front (.jsonl)."""
    ending = table_format(path)
    if ending == ".parquet":
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        try:
            return parquet.read_schema(path).names
        except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError, OSError):
            raise InputError(f"{FILE}: not a readable parquet file") from None
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(LONGEST_HEAD)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError(f"{FILE}: not a whole gzip file") from None
    if not head.strip():
        raise InputError(f"{FILE}: the file is empty")
    if b"\n" not in head and len(head) == LONGEST_HEAD:
        raise InputError(f"{FILE}: the first line is longer than {LONGEST_HEAD} bytes")
    if ending == ".jsonl":
        return None
    try:
        text = head.decode("utf-8-sig", "ignore" if len(head) == LONGEST_HEAD else "strict")
        return next(csv.reader(io.StringIO(text), delimiter=DELIMITERS[ending]))
    except UnicodeDecodeError as error:
        raise InputError(f"{FILE}: not UTF-8 text (byte {error.start})") from None
    except csv.Error as error:
        raise InputError(f"{FILE}: not a table ({error})") from None


JobId = Annotated[str, PathParameter(description="as POST /v1/jobs has answered")]


def job_router(
    service: Service, store: JobStore, settings: PriceServiceSettings, mapping: ColumnMapping, model: str
) -> APIRouter:
    router = APIRouter(tags=["jobs"], dependencies=GUARDED)
    upload_schema = {
        "type": "object",
        "properties": {
            FILE: {
                "type": "string",
                "format": "binary",
                "description": ".csv, .tsv, .jsonl (also .gz) or .parquet",
            }
        },
        "required": [FILE],
    }

    def job_of(job_id: str) -> Job:
        job = store.find(job_id)
        if job is None:
            raise HTTPException(404, NO_JOB)
        return job

    @router.post(
        "/v1/jobs",
        status_code=202,
        responses=problems(400, 401, 413, 415, 422, 503),
        openapi_extra={"requestBody": {"required": True, "content": {MULTIPART: {"schema": upload_schema}}}},
    )
    async def upload(request: Request) -> JobResponse:
        """Price a whole table with the columns of the training table, the price excepted."""
        waiting = await run_in_threadpool(store.unfinished)
        if len(waiting) >= settings.max_jobs:
            raise HTTPException(503, "too many jobs are waiting; try again later", {"Retry-After": "60"})
        # the file goes to disk while it arrives, without a name, so that nothing is left of an upload that breaks off
        form = await read_form(request, max_part_bytes=QUOTED, max_fields=1)
        try:
            sent = form.get(FILE)
            if not isinstance(sent, UploadFile) or not sent.filename:
                raise HTTPException(422, f"{FILE}: send the table as a file in the field {FILE}")
            require_format(sent.filename)
            job = await run_in_threadpool(store.create, sent.filename, sent.file, mapping, model)
        finally:
            await form.close()
        return job.status()

    @router.get("/v1/jobs/{job_id}", responses=problems(401, 404, 422))
    def status(job_id: JobId) -> JobResponse:
        """How far the job is."""
        return job_of(job_id).status()

    @router.get(
        "/v1/jobs/{job_id}/result",
        response_class=FileResponse,
        responses=problems(401, 404, 409, 422) | _file_answer(),
    )
    def result(job_id: JobId) -> FileResponse:
        """The prices, in the format of the uploaded table. Rows without a price say why in `problem`."""
        job = job_of(job_id)
        if job.state != "done":
            raise HTTPException(409, f"the job is {job.state}; the result is there once it is done")
        endings = job.result.name.removeprefix("result")
        return FileResponse(job.result, media_type="application/octet-stream", filename=f"prices{endings}")

    @router.delete("/v1/jobs/{job_id}", status_code=204, responses=problems(401, 404, 422))
    def remove(job_id: JobId) -> Response:
        """Cancel the job and delete its files."""
        try:
            removed = store.remove(job_of(job_id))
        except FileNotFoundError:  # somebody else was faster
            raise HTTPException(404, NO_JOB) from None
        return Response(
            status_code=204, background=BackgroundTask(shutil.rmtree, removed, ignore_errors=True)
        )

    for state in get_args(State):
        service.metrics.jobs.labels(state).set_function(partial(_count, store, state))
    return router


def require_format(name: str) -> None:
    """Raises HTTPException 415 for the name of a file that is no table."""
    try:
        table_format(name)
    except InputError:
        endings = ".csv, .tsv, .jsonl (each also .gz) or .parquet"
        raise HTTPException(415, f"{FILE}: its name has to end in {endings}") from None


def _count(store: JobStore, state: State) -> int:
    return sum(job.state == state for job in store)


def _file_answer() -> dict[int | str, dict[str, Any]]:
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {200: {"content": content}}
