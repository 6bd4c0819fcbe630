"""What every service of this repository refuses, and how: over one with a single small endpoint."""

import json
import logging
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from fastapi import Request
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict, StrictStr
from starlette.formparsers import MultiPartParser

from contracts.errors import InputError
from serving.app import GUARDED, TOKEN, Service, problems
from serving.config import PriceServiceSettings, ServiceSettings
from serving.headers import page_policy
from serving.limits import json_body, read_form, read_json, require_text

URL = "http://127.0.0.1"


class Words(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: StrictStr


def small_service(answer=None, **settings):
    """POST /v1/words answers the length of a text, found in the model thread; POST /v1/files that of a file."""
    settings = ServiceSettings(**{"max_body_bytes": 10_000, "max_text_characters": 100, **settings})
    service = Service("Words", "Counts", settings, largest_bodies={("POST", "/v1/files"): 1_000_000})
    batcher = service.batcher("words", answer or (lambda texts: [len(text) for text in texts]))

    @service.app.post(
        "/v1/words", dependencies=GUARDED, responses=problems(400), openapi_extra=json_body(Words)
    )
    async def words(request: Request) -> int:
        asked = await read_json(request, Words)
        require_text([("text", asked.text)], settings.max_text_characters)
        return await batcher.one(asked.text)

    @service.app.post("/v1/files")
    async def files(request: Request) -> int:
        form = await read_form(request, max_part_bytes=100)
        return form["file"].size

    return service


def client_of(service):
    return TestClient(service.app, base_url=URL, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client():
    with client_of(small_service()) as client:
        yield client


def test_an_answer(client):
    answer = client.post("/v1/words", json={"text": "tea"})
    assert (answer.status_code, answer.json()) == (200, 3)


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b'{"text": "tea"}', "text/plain", 415, "content type text/plain: send application/json"),
        (b'{"text": "tea"}', None, 415, "content type missing"),
        (b'{"text": NaN}', "application/json", 400, "NaN is not a JSON value"),
        (b'{"text"', "application/json", 400, "the body is not JSON"),
        (b"\xff", "application/json", 400, "the body is not UTF-8 (byte 0)"),
        (b"[" * 9_000, "application/json", 400, "the body is not JSON"),
        (b'{"a":' * 1_900, "application/json", 400, "the body is not JSON"),
        (b"1" * 9_000, "application/json", 400, "the body is not JSON"),
        (b"[]", "application/json", 422, "the body: Input should be"),
        (b'{"text": 1}', "application/json", 422, "text: Input should be a valid string"),
        (b'{"text": "a", "more": 1}', "application/json", 422, "more: Extra inputs are not permitted"),
        (b'{"text": "\\ud83d"}', "application/json", 422, "text: it holds half of a surrogate pair"),
        (b'{"text": "' + b"x" * 101 + b'"}', "application/json", 422, "text: 101 characters; at most 100"),
        (b'{"text": "' + b"x" * 10_000 + b'"}', "application/json", 413, "the body is larger than 10000 bytes"),
    ],
)  # fmt: skip
def test_a_bad_body_gets_one_sentence(client, body, kind, status, message):
    answer = client.post("/v1/words", content=body, headers={"content-type": kind} if kind else {})
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["detail"] and message in answer.json()["detail"]


def test_little_of_a_request_is_repeated(client):
    shout = "<script>" * 1_000
    for answer in (
        client.post("/v1/words", json={"text": "a", shout: 1}),
        client.post("/v1/words", json={"text": [shout]}),
        client.post("/v1/words", content=b"{}", headers={"content-type": shout}),
        client.get("/health", headers={"host": shout}),
    ):
        assert 400 <= answer.status_code < 500 and len(answer.text) < 300


def test_a_body_that_does_not_say_its_length_is_counted(client):
    chunks = (b"x" * 1000 for _ in range(100))
    assert (
        client.post("/v1/words", content=chunks, headers={"content-type": "application/json"}).status_code
        == 413
    )


def test_an_endpoint_may_take_more(client):
    content = b"x" * 500_000
    assert client.post("/v1/files", files={"file": content}).json() == 500_000
    assert client.post("/v1/files", files={"file": content * 3}).status_code == 413


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"nonsense", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data"),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"y" * 200 + b"\r\n--x--\r\n",
         "multipart/form-data; boundary=x"),
    ],
)  # fmt: skip
def test_a_bad_form_is_refused(client, content, kind):
    answer = client.post("/v1/files", content=content, headers={"content-type": kind})
    assert answer.status_code == 400 and answer.json()["detail"]


def test_all_bodies_together_have_a_limit():
    """The first body fills it while the model works on it."""
    release = threading.Event()
    arrived = threading.Event()

    def answer(texts):
        arrived.set()
        release.wait(10)
        return [len(text) for text in texts]

    with client_of(small_service(answer, max_bytes_at_once=150)) as client, ThreadPoolExecutor(1) as threads:
        working = threads.submit(client.post, "/v1/words", json={"text": "a" * 90})
        assert arrived.wait(10)
        refused = client.post("/v1/words", json={"text": "b" * 90})
        release.set()
        assert working.result().status_code == 200
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert client.post("/v1/words", json={"text": "b" * 90}).status_code == 200  # the first one is gone


def test_a_full_queue_is_a_503_and_health_still_answers():
    release = threading.Event()

    def answer(texts):
        release.wait(10)
        return [len(text) for text in texts]

    service = small_service(answer, queue=1, wait_ms=0)
    with client_of(service) as client, ThreadPoolExecutor(8) as threads:
        requests = [threads.submit(client.post, "/v1/words", json={"text": "a"}) for _ in range(8)]
        while not service.batchers[0].queue.full():
            pass
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").status_code == 503
        release.set()
        statuses = [request.result().status_code for request in requests]
        busy = [request.result() for request in requests if request.result().status_code == 503]
    assert set(statuses) == {200, 503}
    assert all(answer.headers["retry-after"] == "2" for answer in busy)


def test_a_host_of_somebody_else_is_refused():
    with client_of(small_service(hosts=("prices.example",))) as client:
        for host in ("prices.example", "PRICES.example:443", "localhost:8000", "[::1]:8000", "127.0.0.1"):
            assert client.get("/health", headers={"host": host}).status_code == 200, host
        answer = client.get("/health", headers={"host": "evil.example"})
    assert answer.status_code == 400
    assert (
        answer.json()["detail"]
        == "host 'evil.example' is not served; start the service with --hosts evil.example"
    )


def test_a_token_is_needed_where_there_is_one(monkeypatch):
    monkeypatch.setenv(TOKEN, "s3cret")
    with client_of(small_service()) as client:
        for header in ("", "Bearer", "Bearer wrong", "Bearer ü", "Basic s3cret", "Bearer s3cret more"):
            answer = client.post("/v1/words", json={"text": "a"}, headers={"authorization": header.encode()})
            assert answer.status_code == 401, header
            assert (
                answer.headers["www-authenticate"] == "Bearer" and "Authorization" in answer.json()["detail"]
            )
        for path in ("/health", "/ready", "/metrics", "/docs"):
            assert client.get(path).status_code == 200


@pytest.mark.parametrize("token", ["s3cret", "s3cret-ü"])
def test_the_right_token_is_let_in(monkeypatch, token):
    monkeypatch.setenv(TOKEN, token)
    with client_of(small_service()) as client:
        right = {"authorization": f"Bearer {token}".encode()}
        assert client.post("/v1/words", json={"text": "a"}, headers=right).status_code == 200


def test_no_other_page_may_read_the_answers_unless_it_is_named():
    asks = {"origin": "https://shop.example", "access-control-request-method": "POST"}
    with client_of(small_service()) as client:
        answer = client.options("/v1/words", headers=asks)
        assert "access-control-allow-origin" not in answer.headers
    with client_of(small_service(origins=("https://shop.example",))) as client:
        answer = client.options("/v1/words", headers=asks)
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        other = client.options("/v1/words", headers={**asks, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 400),
        ("http://127.0.0.1.evil.example", 400),
        ("null", 400),
        ("http://localhost:8000", 200),
        ("http://127.0.0.1", 200),
        ("https://shop.example", 200),
    ],
)
def test_pages_of_strangers_cannot_make_a_browser_send_anything(origin, status):
    """Such a request needs no permission (CORS) if it is a plain form; only its answer would be hidden."""
    with client_of(small_service(origins=("https://shop.example",))) as client:
        answer = client.post("/v1/files", files={"file": b"abc"}, headers={"origin": origin})
        assert answer.status_code == status
        assert client.get("/health", headers={"origin": origin}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/docs", "/v1/words"])
def test_every_answer_has_security_headers(client, path):
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_what_is_not_there_is_a_sentence_too(client):
    assert client.get("/nowhere").json() == {"detail": "Not Found"}
    answer = client.get("/v1/words")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and answer.json()["detail"]


def test_an_input_error_of_the_model_is_a_422_and_anything_else_a_500_without_details(caplog):
    def answer(texts):
        raise InputError("the text is odd") if "odd" in texts else KeyError("secret")

    with client_of(small_service(answer)) as client, caplog.at_level(logging.CRITICAL, "serving"):
        odd = client.post("/v1/words", json={"text": "odd"})
        broken = client.post("/v1/words", json={"text": "x"})
    assert (odd.status_code, odd.json()["detail"]) == (422, "the text is odd")
    assert broken.status_code == 500 and "secret" not in broken.text


def test_the_documents_need_no_internet(client):
    page = client.get("/docs").text
    assert "http://" not in page and "https://" not in page
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert len(client.get(f"/docs/assets/{name}").content) > 100_000
    assert client.get("/docs/assets/core.py").status_code == 404
    assert "/v1/words" in client.get("/openapi.json").json()["paths"]


def test_the_figures_count_requests_by_route_and_not_by_what_strangers_type():
    with client_of(small_service()) as client:
        client.post("/v1/words", json={"text": "a"})
        for number in range(3):
            client.get(f"/made-up-{number}")
        figures = client.get("/metrics").text
    assert 'http_requests_total{path="/v1/words",status="200"} 1.0' in figures
    assert 'http_requests_total{path="none",status="404"} 3.0' in figures
    assert 'model_batch_items_count{model="words"} 1.0' in figures
    assert 'model_queue_items{model="words"} 0.0' in figures
    assert "made-up" not in figures


def test_a_page_may_run_only_its_own_scripts():
    policy = page_policy("<style>a{}</style><script>b()</script>")
    script = policy.split("script-src ")[1].split(";")[0]
    # of `printf 'b()' | openssl dgst -sha256 -binary | base64`
    assert script == "'sha256-cf242PFc/kb7xD0Qzhsmd9vvRkc+cWFmbi+k+YvtdKc='"
    assert "unsafe-inline" not in policy
    assert page_policy("<script>c()</script>").split("script-src ")[1] != policy.split("script-src ")[1]


def test_an_upload_that_breaks_off_leaves_no_traceback_and_no_file(caplog, tmp_path, monkeypatch):
    """Over a real connection: half of a body, more than is kept in memory, and then the client is gone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    monkeypatch.setattr(MultiPartParser, "spool_max_size", 10_000)
    server = uvicorn.Server(uvicorn.Config(small_service().app, log_config=None))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    with caplog.at_level(logging.WARNING):
        thread.start()
        for _ in range(3):
            with socket.create_connection(listening.getsockname(), timeout=10) as client:
                client.sendall(head + b"y" * 100_000)
        with socket.create_connection(listening.getsockname(), timeout=10) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in client.recv(1000)
        server.should_exit = True
        thread.join()
    listening.close()
    assert caplog.records == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queue": 0}, "--queue 0: must be at least 1"),
        ({"head_seconds": float("nan")}, "--head-seconds nan: must be a number above 0"),
        ({"wait_ms": -1.0}, "--wait-ms -1.0: must be 0 to 1000"),
        ({"port": 70_000}, "--port 70000: must be 0 to 65535"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        PriceServiceSettings(**settings)


def test_the_body_in_the_document_has_no_references(client):
    schema = client.get("/openapi.json").json()["paths"]["/v1/words"]["post"]["requestBody"]
    assert "$ref" not in json.dumps(schema) and "text" in json.dumps(schema)
