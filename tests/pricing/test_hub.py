"""A system goes to a hub and comes back. The hub is a server in this process, so that nothing leaves the machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import constants

from contracts.errors import InputError
from contracts.tables import read_any
from pricing import PriceModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_this_test"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as one upload and one download need."""

    files: dict[str, bytes] = {}
    created: list[dict] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid token"})
        elif self.path == "/api/repos/create":
            Hub.created.append(json.loads(body))
            self.answer(200, {"url": f"{constants.ENDPOINT}/shop/prices"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            self.answer(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    Hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{constants.ENDPOINT}/shop/prices/commit/{COMMIT}"
            self.answer(200, {"commitOid": COMMIT, "commitUrl": url})
        else:
            self.answer(200, {"errors": [], "warnings": []})  # of the model card

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/shop/prices") and "/tree/" in path:
            sizes = [
                {"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in Hub.files.items()
            ]
            self.answer(200, sizes)
        elif path.startswith("/api/models/shop/prices"):
            siblings = [{"rfilename": name} for name in Hub.files]
            self.answer(200, {"id": "shop/prices", "sha": COMMIT, "siblings": siblings, "tags": []})
        elif path.startswith("/shop/prices/resolve/"):
            self.send_file(path.split("/", 5)[5])
        else:
            self.answer(404, {"error": "Repository not found"})

    do_HEAD = do_GET

    def send_file(self, name):
        content = Hub.files[name]
        self.send_response(200)
        self.send_header("ETag", f'"{hash(content):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "created", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield Hub
        server.shutdown()


def test_a_system_that_was_pushed_prices_as_before(word_system, sample_workspace, hub, monkeypatch):
    model = PriceModel.load(word_system, device="cpu")
    address = model.push_to_hub("shop/prices")
    assert address.startswith(f"{constants.ENDPOINT}/shop/prices")
    (created,) = hub.created
    assert created["visibility"] == "private"
    assert hub.files["README.md"].startswith(b"---\nlicense: other")
    assert "checkpoints/words_mlp/COMPLETE" in hub.files

    raw = read_any(sample_workspace / "catalogue" / "test.csv")
    loaded = PriceModel.from_pretrained("shop/prices", device="cpu")
    assert loaded.root.name == COMMIT
    np.testing.assert_allclose(loaded.predict(raw)["price"], model.predict(raw)["price"], rtol=1e-5)


def test_products_and_prices_may_stay_at_home(word_system, hub):
    PriceModel.load(word_system, device="cpu").push_to_hub("shop/prices", known_products=False, license="mit")
    assert not [name for name in hub.files if name.startswith("data/") and name.endswith((".csv", ".pkl"))]
    assert hub.files["README.md"].startswith(b"---\nlicense: mit")


def test_what_the_hub_refuses_is_one_line(word_system, hub, monkeypatch):
    model = PriceModel.load(word_system, device="cpu")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(InputError, match=r"^shop/prices: not uploaded \(.*401.*\)$"):
        model.push_to_hub("shop/prices")
    with pytest.raises(InputError, match="^nobody/nothing: no such folder, and not on the hub "):
        PriceModel.from_pretrained("nobody/nothing")
    assert hub.files == {}
