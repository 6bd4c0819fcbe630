"""Catalogues that are priced in the background, with a model that only counts: nothing lost, nothing priced twice."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

from contracts.catalog import ColumnMapping
from contracts.errors import InputError
from contracts.tables import read_any, table_writer
from serving import worker as worker_module
from serving.app import Service
from serving.config import PriceServiceSettings
from serving.jobs import CHUNK_ROWS, MOST_STARTS, JobStore, job_router
from serving.worker import Supervisor, Unwanted, Worker, WorkerSettings, only_one

MAPPING = ColumnMapping(id="sku", text=("title",), image=None)
MODEL = "fingerprint"


class Counting:
    """Prices a product by the number in its title; notes what it has priced."""

    mapping = MAPPING

    def __init__(self, log=None, seconds=0.0):
        self.log = log
        self.seconds = seconds
        self.priced = []

    def predict(self, table):
        time.sleep(self.seconds)
        titles = table["title"].tolist()
        if "poison" in titles:
            raise InputError("the model refuses poison")
        if "bomb" in titles:
            raise KeyError("a mistake")
        self.priced += table["sku"].tolist()
        if self.log:
            with open(self.log, "a") as file:
                file.writelines(sku + "\n" for sku in table["sku"])
        price = np.array([float(title.split()[-1]) for title in titles])
        columns = {"sample_id": table["sku"].to_numpy(), "price": price}
        for name in ("low_80", "high_80", "low_95", "high_95"):
            columns[name] = price
        return pd.DataFrame({**columns, "missing": "amount"})


def catalogue(rows, **changed):
    table = pd.DataFrame(
        {"sku": [f"S{n}" for n in range(rows)], "title": [f"item {n + 1}" for n in range(rows)]}
    )
    for row, title in changed.get("titles", {}).items():
        table.loc[row, "title"] = title
    for row, sku in changed.get("skus", {}).items():
        table.loc[row, "sku"] = sku
    return table


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "jobs")


def create(store, table, name="new.csv", tmp=None):
    path = store.root.parent / name
    with table_writer(path) as writer:
        writer.write(table)
    with path.open("rb") as content:
        return store.create(name, content, MAPPING, MODEL)


def finish(job, model=None):
    worker = Worker(model or Counting(), MODEL, WorkerSettings())
    worker.run(job)
    return job.status()


@pytest.mark.parametrize("name", ["new.csv", "new.tsv", "new.jsonl", "new.parquet", "new.csv.gz"])
def test_the_result_has_every_row_and_the_format_of_the_table(store, name):
    job = create(store, catalogue(2500), name)
    assert job.status().state == "queued"
    status = finish(job)
    assert (status.state, status.rows, status.rows_done, status.seconds_left) == ("done", 2500, 2500, 0.0)
    assert job.result.name == name.replace("new", "result")
    result = read_any(job.result)
    assert result["sample_id"].tolist() == [f"S{n}" for n in range(2500)]
    assert result["price"].astype(float).tolist() == [float(n + 1) for n in range(2500)]


def test_bad_rows_are_named_and_spoil_no_other(store):
    titles = {3: "", 200: "poison", 1030: "x" * 30_000, 1040: "bomb", 1500: "poison"}
    job = create(store, catalogue(1600, titles=titles, skus={7: " "}))
    status = finish(job)
    assert status.state == "done" and status.bad_rows_total == 6
    reasons = {bad.row: bad.reason for bad in status.bad_rows}
    assert reasons == {
        4: "it has no text",
        8: "its sku is empty",
        201: "the model refuses poison",
        1031: "its text has 30000 characters; at most 20000 are allowed",
        1041: "the model could not price it",
        1501: "the model refuses poison",
    }
    result = read_any(job.result)
    assert len(result) == 1600
    assert result["problem"][200] == "the model refuses poison" and result["price"][200] == ""
    assert (result["price"] != "").sum() == 1594


def test_formulas_are_neutralised_where_a_spreadsheet_would_run_them(store):
    dangerous = ["=1+1", "+1", "-1", "@a", "\tb", "\rc"]
    skus = dict(enumerate(dangerous))
    for name in ("new.csv", "new.parquet"):
        job = create(store, catalogue(8, skus=skus), name)
        finish(job)
        ids = read_any(job.result)["sample_id"].tolist()
        if name == "new.csv":
            assert ids[:4] == ["'=1+1", "'+1", "'-1", "'@a"]
            assert all(not cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in ids)
        else:
            assert ids[:4] == dangerous[:4]


def test_a_finished_part_is_not_priced_again(store, monkeypatch):
    """The process ends in the middle of the third part; its successor prices that part and the rest."""
    job = create(store, catalogue(3 * CHUNK_ROWS + 10))
    first = Counting()

    def dies(table, predict=first.predict):
        if len(first.priced) >= 2 * CHUNK_ROWS + 256:
            raise KeyboardInterrupt
        return predict(table)

    first.predict = dies
    with pytest.raises(KeyboardInterrupt):
        finish(job, first)
    status = job.status()
    assert (status.state, job.parts) == ("running", 2)
    assert status.rows_done == 2 * CHUNK_ROWS + 256 and status.seconds_left is not None
    second = Counting()
    assert finish(job, second).state == "done"
    assert second.priced == [f"S{n}" for n in range(2 * CHUNK_ROWS, 3 * CHUNK_ROWS + 10)]
    result = read_any(job.result)
    assert result["sample_id"].tolist() == [f"S{n}" for n in range(3 * CHUNK_ROWS + 10)]


PROCESS = """
import sys, time
sys.path.insert(0, {folder!r})
from test_jobs import Counting, MODEL
from serving import worker
worker.open_worker = lambda settings: worker.Worker(Counting({log!r}, seconds=0.02), MODEL, settings)
worker.IDLE_SECONDS = 0.3
worker.main(["--jobs", {jobs!r}])
"""


def test_killed_at_any_moment_nothing_is_lost_and_no_finished_part_priced_twice(store, tmp_path):
    rows = 6 * CHUNK_ROWS
    job = create(store, catalogue(rows))
    log = tmp_path / "priced.txt"
    script = PROCESS.format(folder=str(Path(__file__).parent), log=str(log), jobs=str(store.root))

    parts_at_kill = []
    while not parts_at_kill or job.state != "done":
        process = subprocess.Popen([sys.executable, "-c", script])
        if len(parts_at_kill) < 2:
            wanted = (len(parts_at_kill) + 1) * 2
            while job.parts < wanted and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        process.wait(60)
        parts_at_kill.append(job.parts)
    result = read_any(job.result)
    assert result["sample_id"].tolist() == [f"S{n}" for n in range(rows)]
    priced = log.read_text().split()
    repeated = {sku for sku in priced if priced.count(sku) > 1}
    for killed in parts_at_kill[:2]:
        # only rows of the part that was in work
        repeated -= {f"S{n}" for n in range(killed * CHUNK_ROWS, (killed + 1) * CHUNK_ROWS)}
    assert repeated == set()


def test_a_removed_job_ends_its_work(store):
    job = create(store, catalogue(3 * CHUNK_ROWS))
    model = Counting()

    def removed_meanwhile(table, predict=model.predict):
        if len(model.priced) == CHUNK_ROWS:
            shutil.rmtree(store.remove(job))
        return predict(table)

    model.predict = removed_meanwhile
    with pytest.raises(Unwanted):
        finish(job, model)
    assert len(model.priced) < 2 * CHUNK_ROWS
    assert store.find(job.id) is None and list(store) == []


def test_a_worker_without_its_service_stops(store, monkeypatch):
    job = create(store, catalogue(10))
    worker = Worker(Counting(), MODEL, WorkerSettings())
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(Unwanted):
        worker.run(job)
    assert job.state != "done"


def test_a_part_that_ends_every_worker_is_given_up(store):
    job = create(store, catalogue(2 * CHUNK_ROWS))
    model = Counting()

    def dies(table, predict=model.predict):
        if len(model.priced) >= CHUNK_ROWS:
            raise KeyboardInterrupt
        return predict(table)

    model.predict = dies
    for _ in range(MOST_STARTS + 1):
        if job.state != "failed":
            with pytest.raises(KeyboardInterrupt):
                finish(job, model)
    status = finish(job, model)
    assert status.state == "failed" and "at rows 1025 to 2048" in status.error


def test_another_model_does_not_go_on_with_a_job(store):
    job = create(store, catalogue(10))
    Worker(Counting(), "another", WorkerSettings()).run(job)
    assert job.status().error == "the model was changed while the job was waiting; upload the table again"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"sku,name\n1,tea\n", "file: column title is missing; found sku, name"),
        ("a.csv", b"", "file: the file is empty"),
        ("a.csv", b"sku,title\xff\n", "file: not UTF-8 text"),
        ("a.csv", b"x" * (1 << 20) + b"x", "file: the first line is longer than"),
        ("a.csv.gz", b"sku,title\n", "file: not a whole gzip file"),
        ("a.parquet", b"PAR1", "file: not a readable parquet file"),
        ("a.txt", b"sku,title\n", "the format is not known"),
    ],
)
def test_a_table_that_cannot_be_priced_is_refused_and_leaves_nothing(store, name, content, message):
    path = store.root.parent / "upload"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message), path.open("rb") as file:
        store.create(name, file, MAPPING, MODEL)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'sku,title\n1,tea 1\n2,"tea 2\n', "file: not a table"),
        ("a.csv", b"sku,title\n1,tea,3\n", "file: not a table"),
        ("a.jsonl", b'{"sku": 1, "title": "tea 1"}\nnonsense\n', "file: line 2 is not JSON"),
        ("a.csv.gz", gzip.compress(b"sku,title\n" + b"1,tea 1\n" * 500_000)[:-200], "file: not a whole gzip file"),
    ],
)  # fmt: skip
def test_damage_further_down_fails_the_job_with_a_sentence(store, name, content, message):
    path = store.root.parent / "upload"
    path.write_bytes(content)
    with path.open("rb") as file:
        job = store.create(name, file, MAPPING, MODEL)
    status = finish(job)
    assert status.state == "failed" and status.error.startswith(message), status.error


def test_a_table_without_rows_fails_the_job(store):
    status = finish(create(store, catalogue(0)))
    assert (status.state, status.error) == ("failed", "file: the table has no rows")


def test_bad_rows_are_numbered_as_rows_and_not_as_lines(store):
    path = store.root.parent / "upload"
    lines = ['{"sku": "1", "title": "tea 1"}', "", '{"sku": "2", "title": "tea 2"}'] * 1000
    path.write_text("\n".join([*lines, '{"sku": "3", "title": ""}']))
    with path.open("rb") as file:
        job = store.create("a.jsonl", file, MAPPING, MODEL)
    status = finish(job)
    assert status.rows == 2001 and [bad.row for bad in status.bad_rows] == [2001]


def test_a_prepared_table_cannot_name_files_of_this_machine(store):
    """Only the columns of the model are read, not those that a prepared table has."""
    seen = []
    model = Counting()
    model.predict = lambda table, predict=model.predict: seen.append(list(table.columns)) or predict(table)
    table = catalogue(3).assign(
        image="/etc/passwd", sample_id="1", catalog_content="", text="", entity_name=""
    )
    assert finish(create(store, table), model).state == "done"
    assert seen == [["sku", "title"]]


def test_old_jobs_and_leftovers_are_deleted(store):
    done = create(store, catalogue(3))
    finish(done)
    waiting = create(store, catalogue(3))
    leftover = store.root / ".upload-abc"
    leftover.mkdir()
    long_ago = time.time() - 10 * 24 * 3600
    for folder in (done.folder, waiting.folder, leftover):
        os.utime(folder, (long_ago, long_ago))
    store.remove_expired(7)
    assert {folder.name for folder in store.root.iterdir()} == {waiting.id}


def test_there_is_one_worker_per_folder(store):
    with only_one(store.root) as first, only_one(store.root) as second:
        assert (first, second) == (True, False)
    with only_one(store.root) as again:
        assert again


def test_a_worker_that_was_killed_is_replaced(store, monkeypatch):
    monkeypatch.setattr(worker_module, "WAIT_AFTER_CRASH", 0.0)
    supervisor = Supervisor(store, PriceServiceSettings())
    supervisor.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    supervisor._look()
    assert supervisor.process is None  # there is nothing to do
    create(store, catalogue(3))
    supervisor._look()
    first = supervisor.process
    supervisor._look()
    assert supervisor.process is first
    first.kill()
    first.wait()
    supervisor._look()
    assert supervisor.process.pid != first.pid
    supervisor.process.kill()
    supervisor.process.wait()


@pytest.fixture
def client(store):
    settings = PriceServiceSettings(max_jobs=2, max_job_bytes=100_000)
    service = Service("Jobs", "", settings, largest_bodies={("POST", "/v1/jobs"): settings.max_job_bytes})
    service.app.include_router(job_router(service, store, settings, MAPPING, MODEL))
    with TestClient(service.app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def upload(client, name="a.csv", content=b"sku,title\n1,tea 5\n"):
    return client.post("/v1/jobs", files={"file": (name, content)})


def test_from_upload_to_result(client, store):
    answer = upload(client)
    assert answer.status_code == 202
    job_id = answer.json()["id"]
    assert client.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"
    early = client.get(f"/v1/jobs/{job_id}/result")
    assert early.status_code == 409 and "queued" in early.json()["detail"]
    finish(store.find(job_id))
    assert client.get(f"/v1/jobs/{job_id}").json()["state"] == "done"
    result = client.get(f"/v1/jobs/{job_id}/result")
    assert result.headers["content-disposition"] == 'attachment; filename="prices.csv"'
    assert result.text.splitlines()[1].startswith('"1",5.0,')
    assert 'jobs{state="done"} 1.0' in client.get("/metrics").text
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert client.get(f"/v1/jobs/{job_id}").status_code == 404
    assert [folder.name for folder in store.root.iterdir()] == []


@pytest.mark.parametrize("job_id", ["a" * 32, "..", "%2e%2e", "..%2f..%2fetc", "x", "A" * 32])
def test_a_job_that_is_not_there_is_a_404(client, job_id):
    for answer in (
        client.get(f"/v1/jobs/{job_id}"),
        client.get(f"/v1/jobs/{job_id}/result"),
        client.delete(f"/v1/jobs/{job_id}"),
    ):
        assert answer.status_code in (404, 405)


def test_uploads_that_cannot_be_taken(client, store):
    assert upload(client, "a.xlsx").status_code == 415
    assert upload(client, content=b"a,b\n1,2\n").status_code == 422
    assert client.post("/v1/jobs", files={"other": ("a.csv", b"x")}).status_code == 422
    assert client.post("/v1/jobs", data={"file": "text"}, files={"x": b""}).status_code in (400, 422)
    assert client.post("/v1/jobs", json={}).status_code == 415
    assert upload(client, content=b"x" * 200_000).status_code == 413
    assert upload(client, "../../../etc/evil.csv").status_code == 202
    assert upload(client).status_code == 202
    full = upload(client)
    assert full.status_code == 503 and full.headers["retry-after"]
    names = {file.name for folder in store.root.iterdir() for file in folder.iterdir()}
    assert names == {"input.csv", "job.json"}


def test_a_disk_that_is_full_leaves_nothing(client, store, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert upload(client).status_code == 503
    assert list(store.root.iterdir()) == []


def test_the_answer_is_json_of_the_contract(client):
    status = upload(client).json()
    assert json.loads(json.dumps(status)) == {
        "id": status["id"],
        "state": "queued",
        "rows": None,
        "rows_done": 0,
        "bad_rows": [],
        "bad_rows_total": 0,
        "seconds_left": None,
        "error": None,
    }
