"""The downloader against a local server that misbehaves in every way a picture host does."""

import csv
import functools
import io
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from PIL import Image

from contracts.errors import InputError
from contracts.files import write_json
from data import download_images
from data.public_addresses import PublicOpener


def jpeg(side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 50).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


PICTURE = jpeg()


class Handler(BaseHTTPRequestHandler):
    """Answers by the first part of the path; counts the requests of each path."""

    def do_GET(self):
        self.server.requests[self.path] += 1
        getattr(self, self.path.split("/")[1])(self.server.requests[self.path])

    def send(self, body: bytes, code: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def ok(self, _):
        self.send(PICTURE)

    def missing(self, _):
        self.send(b"", 404)

    def flaky(self, attempt):
        self.send(PICTURE if attempt == 3 else b"", 200 if attempt == 3 else 500)

    def broken(self, _):
        self.send(b"", 503)

    def busy(self, attempt):
        self.server.times.append(time.monotonic())
        if attempt == 1:
            self.send(b"", 429, Retry_After="1")
        else:
            self.send(PICTURE)

    def silent(self, _):
        self.server.released.wait(5)

    def dripping(self, _):
        self.send(b"", length=len(PICTURE))
        for byte in PICTURE:
            if self.server.released.wait(0.05):
                break
            self.wfile.write(bytes([byte]))
            self.wfile.flush()

    def large(self, _):
        self.send(jpeg(256))

    def unannounced(self, _):
        """A large body without Content-Length."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(jpeg(256))

    def html(self, _):
        self.send(b"<html>log in</html>", Content_Type="image/jpeg")

    def half(self, attempt):
        self.send(PICTURE[:500] if attempt == 1 else PICTURE, length=len(PICTURE))

    def cut(self, _):
        self.send(PICTURE[:500], length=len(PICTURE))

    def redirect(self, _):
        self.send(b"", 302, Location="file:///etc/hostname")

    def inside(self, _):
        self.send(b"", 302, Location="http://inside.example/ok")

    def drip(self, text: bytes) -> None:
        """Send `text` over and over, more often than any timeout of a socket."""
        while not self.server.released.wait(0.05):
            self.wfile.write(text)
            self.wfile.flush()

    def slow_headers(self, _):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        self.drip(b"x")

    def continuing(self, _):
        self.drip(b"HTTP/1.1 100 Continue\r\n\r\n")

    def slow_chunks(self, _):
        """The size of a chunk may have as many leading zeros as one likes."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.drip(b"0")

    def unannounced_and_slow(self, _):
        """A whole picture that is followed by nothing: the end of the connection would make it complete."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE)
        self.server.released.wait(5)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download_images, "FIRST_BACKOFF", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests = Counter()
    server.times = []
    server.released = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def write_workspace(root, links: dict[str, str]):
    """A workspace whose training rows have these links; the image of id x is x.jpg. One test row has no link."""
    images = [f"{sample_id}.jpg" if link else "" for sample_id, link in links.items()]
    train = pd.DataFrame({"sample_id": list(links), "image": images, "image_link": list(links.values())})
    test = pd.DataFrame({"sample_id": ["t1"], "image": [""], "image_link": [""]})
    (root / "data").mkdir(exist_ok=True)
    train.to_csv(root / "data" / "prepared_train.csv", index=False)
    test.to_csv(root / "data" / "prepared_test.csv", index=False)
    write_json(root / "data" / "catalog.json", {"images_folder": str(root / "pictures")})


def read_status(root) -> dict[str, tuple[str, str]]:
    with open(root / "data" / "image_status.csv", newline="", encoding="utf-8") as file:
        return {row["sample_id"]: (row["status"], row["detail"]) for row in csv.DictReader(file)}


def run(root, *flags: str) -> dict[str, tuple[str, str]]:
    """The server of these tests is a private one."""
    settings = ["--workspace", str(root), "--workers", "4", "--timeout", "2", "--allow-private"]
    download_images.main([*settings, *flags])
    left = [path.name for path in (root / "pictures").iterdir() if path.suffix != ".jpg"]
    assert not left, "temporary files stay behind"
    return read_status(root)


def test_each_answer_has_its_status(server, tmp_path, capsys):
    answers = ("ok", "missing", "flaky", "broken", "large", "unannounced", "html", "half", "cut", "redirect")
    links = {name: f"{server.url}/{name}" for name in answers}
    links |= {"file": "file:///etc/hostname", "bracket": "http://[oops", "nobody": "http://127.0.0.1:1/x.jpg"}
    links |= {"spaces": f"{server.url}/ok/a picture%20é.jpg", "0007": ""}
    write_workspace(tmp_path, links)
    status = run(tmp_path, "--retries", "2", "--max-bytes", str(len(PICTURE) + 1))

    assert {sample_id: outcome for sample_id, (outcome, _) in status.items()} == {
        "ok": "ok", "missing": "http_404", "flaky": "ok", "broken": "http_503", "large": "too_large",
        "unannounced": "too_large", "html": "not_an_image", "half": "ok", "cut": "truncated",
        "redirect": "http_302", "file": "bad_link", "bracket": "bad_link", "nobody": "unreachable",
        "spaces": "ok", "0007": "no_link", "t1": "no_link",
    }  # fmt: skip
    assert "3 attempts" in status["flaky"][1]
    assert "2 attempts" in status["half"][1]
    tries = {
        name: server.requests[f"/{name}"]
        for name in ("ok", "missing", "flaky", "broken", "html", "half", "cut")
    }
    assert tries == {"ok": 1, "missing": 1, "flaky": 3, "broken": 3, "html": 1, "half": 2, "cut": 3}
    assert sorted(path.stem for path in (tmp_path / "pictures").iterdir()) == [
        "flaky",
        "half",
        "ok",
        "spaces",
    ]
    assert (tmp_path / "pictures" / "half.jpg").read_bytes() == PICTURE
    assert "16 rows, 14 pictures: 4 ok" in capsys.readouterr().out


def test_silent_and_dripping_servers_time_out(server, tmp_path):
    write_workspace(tmp_path, {"silent": f"{server.url}/silent", "dripping": f"{server.url}/dripping"})
    started = time.monotonic()
    status = run(tmp_path, "--timeout", "0.1", "--retries", "1")
    assert status["silent"] == ("timeout", "silent for 0.1 s")
    assert status["dripping"] == ("timeout", "not complete after 0.6 s")
    assert server.requests == {"/silent": 2, "/dripping": 2}
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("answer", ["slow_headers", "continuing", "slow_chunks", "dripping"])
def test_no_server_can_keep_a_request(server, tmp_path, answer):
    """Every one of them sends something before the timeout of the socket, and never comes to an end."""
    write_workspace(tmp_path, {"a": f"{server.url}/{answer}"})
    started = time.monotonic()
    assert run(tmp_path, "--timeout", "0.2", "--retries", "0")["a"] == ("timeout", "not complete after 1.2 s")
    assert run(tmp_path, "--deadline", "0.5")["a"][0] == "deadline"
    assert time.monotonic() - started < 5


def test_a_picture_whose_end_never_comes_is_not_taken(server, tmp_path):
    write_workspace(tmp_path, {"a": f"{server.url}/unannounced_and_slow"})
    assert run(tmp_path, "--timeout", "4", "--deadline", "0.5")["a"][0] == "deadline"
    assert not (tmp_path / "pictures" / "a.jpg").exists()


PUBLIC = "93.184.216.34"


@pytest.fixture
def network(server, monkeypatch):
    """Names resolve here, and every connection ends at the loopback server; it holds the addresses that were asked."""
    names = {
        "shop.example": [PUBLIC],
        "inside.example": ["10.0.0.7"],
        "both.example": [PUBLIC, "169.254.169.254"],
    }
    asked = []

    def resolve(host, port, **options):
        if host in names:
            return [(0, 0, 0, "", (address, port)) for address in names[host]]
        return socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST, **options)

    def connect(address, timeout, source_address):
        asked.append(address[0])
        return socket.create_connection(("127.0.0.1", server.server_port), timeout)

    opener = functools.partial(PublicOpener, resolve=resolve, connect=connect)
    monkeypatch.setattr(download_images, "PublicOpener", opener)
    return asked


INSIDE = {
    "loopback": "http://127.0.0.1/ok", "decimal": "http://2130706433/ok", "hex": "http://0x7f000001/ok",
    "octal": "http://0177.0.0.1/ok", "short": "http://127.1/ok", "mapped": "http://[::ffff:127.0.0.1]/ok",
    "six": "http://[::1]/ok", "link_local": "http://169.254.169.254/ok", "private": "http://192.168.1.1/ok",
    "zero": "http://0.0.0.0/ok", "name": "http://inside.example/ok", "one_of_two": "http://both.example/ok",
}  # fmt: skip


def test_hosts_that_are_not_public_are_not_asked(network, tmp_path):
    write_workspace(tmp_path, INSIDE)
    download_images.main(["--workspace", str(tmp_path), "--retries", "2"])
    status = read_status(tmp_path)
    assert {name: status[name][0] for name in INSIDE} == dict.fromkeys(INSIDE, "not_public")
    assert network == []


def test_a_redirect_inside_is_not_followed(server, network, tmp_path):
    write_workspace(tmp_path, {"a": "http://shop.example/ok", "b": "http://shop.example/inside"})
    download_images.main(["--workspace", str(tmp_path)])
    status = read_status(tmp_path)
    assert (status["a"][0], status["b"][0]) == ("ok", "not_public")
    assert network == [PUBLIC, PUBLIC]
    assert server.requests == {"/ok": 1, "/inside": 1}


def test_one_s_own_network_on_request(network, tmp_path):
    write_workspace(tmp_path, {"a": "http://inside.example/ok"})
    download_images.main(["--workspace", str(tmp_path), "--allow-private"])
    assert read_status(tmp_path)["a"][0] == "ok"
    assert network == ["10.0.0.7"]


def test_retry_after_is_honoured(server, tmp_path):
    write_workspace(tmp_path, {"busy": f"{server.url}/busy"})
    assert run(tmp_path)["busy"][0] == "ok"
    assert server.times[1] - server.times[0] >= 1


def test_retry_after_formats(monkeypatch):
    monkeypatch.setattr(download_images.time, "time", lambda: 0.0)
    assert download_images._retry_after("120") == 120
    assert download_images._retry_after("Thu, 01 Jan 1970 00:01:00 GMT") == 60
    assert download_images._retry_after("soon") == download_images._retry_after(None) == 0


def test_a_second_run_fetches_only_what_is_missing(server, tmp_path):
    write_workspace(
        tmp_path, {"a": f"{server.url}/ok/a", "b": f"{server.url}/ok/b", "c": f"{server.url}/missing"}
    )
    run(tmp_path)
    damaged = tmp_path / "pictures" / "b.jpg"
    damaged.write_bytes(PICTURE[:-200])
    status = run(tmp_path)
    assert [status[sample_id][0] for sample_id in "abc"] == ["present", "ok", "http_404"]
    assert server.requests == {"/ok/a": 1, "/ok/b": 2, "/missing": 2}
    assert damaged.read_bytes() == PICTURE


def test_one_link_of_two_rows_is_fetched_once(server, tmp_path):
    write_workspace(tmp_path, {"a": f"{server.url}/ok"})
    table = tmp_path / "data" / "prepared_test.csv"
    table.write_text(f"sample_id,image,image_link\nt1,a.jpg,{server.url}/ok\n")
    status = run(tmp_path)
    assert status["a"] == status["t1"]
    assert status["a"][0] == "ok"
    assert server.requests == {"/ok": 1}


def test_deadline(server, tmp_path):
    write_workspace(tmp_path, {f"{number}": f"{server.url}/dripping/{number}" for number in range(12)})
    status = run(tmp_path, "--deadline", "0.5")
    assert {status[f"{number}"][0] for number in range(12)} == {"deadline"}
    assert len(server.requests) == 4, "only the four workers started"


def test_a_wait_beyond_the_deadline_is_not_begun(server, tmp_path):
    write_workspace(tmp_path, {"busy": f"{server.url}/busy"})
    # a wait that had begun would have ended as "deadline"
    assert run(tmp_path, "--deadline", "0.9")["busy"][0] == "http_429"


def test_ctrl_c_writes_the_status(server, tmp_path):
    links = {f"{number}": f"{server.url}/dripping/{number}" for number in range(6)}
    write_workspace(tmp_path, {"first": f"{server.url}/ok", **links})
    command = [
        sys.executable, "-m", "data.download_images", "--workspace", str(tmp_path), "--workers", "2",
        "--allow-private",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # a shell starts background jobs with Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while len(server.requests) < 3 and process.poll() is None:  # the first is done, both workers are busy
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130, output
    status = read_status(tmp_path)
    assert status["first"][0] == "ok"
    assert {status[number][0] for number in links} == {"interrupted"}
    assert "6 interrupted" in output
    assert "Traceback" not in output


def test_ctrl_c_while_links_are_dealt_does_not_wait_for_downloads(server, tmp_path, monkeypatch):
    links = {f"{number}": f"{server.url}/dripping/{number}" for number in range(6)}
    write_workspace(tmp_path, links)
    submit = download_images.ThreadPoolExecutor.submit
    submitted = []

    def interrupted(pool, *arguments):
        if len(submitted) == 3:
            raise KeyboardInterrupt
        submitted.append(submit(pool, *arguments))
        return submitted[-1]

    monkeypatch.setattr(download_images.ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path, "--workers", "2")
    status = read_status(tmp_path)
    assert {status[number][0] for number in links} == {"interrupted"}


def test_a_full_disk_ends_the_run(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_workspace(tmp_path, {"a": f"{server.url}/ok"})
    monkeypatch.setattr(download_images.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    assert not (tmp_path / "data" / "image_status.csv").exists()


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="no prepared table"):
        run(tmp_path)
    write_workspace(tmp_path, {"../escape": "http://127.0.0.1:1/x"})
    with pytest.raises(InputError, match="sample_id ../escape is not a plain file name"):
        run(tmp_path)
    with pytest.raises(InputError, match="--workers 0: must be 1 or more"):
        download_images.main(["--workspace", str(tmp_path), "--workers", "0"])
