import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fastapi.testclient import TestClient

from contracts.errors import InputError
from product_matching import search
from product_matching.api import create_service
from product_matching.config import ServeSettings
from product_matching.search import Matcher

LIMITS = ServeSettings(max_body_bytes=20_000, max_titles=4, max_title_characters=500, max_k=50)


@pytest.fixture(scope="module")
def matcher(shop_index) -> Matcher:
    return Matcher.load(shop_index, device="cpu")


def client_of(matcher, settings) -> TestClient:
    """To be used in a `with` block, which starts the service's queue."""
    app = create_service(matcher, settings).app
    # a 500 must show as a 500, not as the exception in the test
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(matcher):
    with client_of(matcher, LIMITS) as client:
        yield client


def test_a_record_finds_itself_by_its_title(matcher):
    record = matcher.index.catalogue[matcher.index.catalogue["brand"] == ""].iloc[0]
    best = matcher.match([record["title"]], k=3)[0][0]
    assert (best.id, best.category) == (record["id"], record["category"])
    assert best.cosine == pytest.approx(1, abs=1e-5)
    # slope 40, intercept -36: cosine 1 is e^4 / (1 + e^4)
    assert best.probability == pytest.approx(1 / (1 + np.exp(-4)), abs=1e-3) and best.confidence == "high"


def test_confidence_follows_the_calibration_not_the_cosine(matcher):
    matches = matcher.match(["Alderby 19 inch LCD Television"], k=40)[0]
    assert [match.cosine for match in matches] == sorted((match.cosine for match in matches), reverse=True)
    for match in matches:
        expected = "high" if match.probability > 0.85 else "medium" if match.probability > 0.75 else "low"
        assert match.confidence == expected


def test_an_index_without_calibration_gives_no_probability(matcher, monkeypatch):
    monkeypatch.setitem(matcher.index.meta, "calibration", None)
    best = matcher.match(["a tv"], k=1)[0][0]
    assert best.probability is None and best.confidence is None


def test_command_line_prints_the_matches(shop_index, matcher, capsys):
    title = matcher.index.catalogue["title"].iloc[3]
    found = search.main([title, "--index", str(shop_index), "--k", "2", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(found) == len(lines) == 2 and found[0].id in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "3"], "give the title first"),
        (["  "], "give the title first"),
        (["tv", "--k", "0"], "--k 0: must be at least 1"),
        (["tv", "--category", "shoes"], "category 'shoes' is not in this catalogue"),
        (["tv", "--index", "/no/index"], "no index.json there"),
    ],
)
def test_bad_command_lines_are_refused(shop_index, arguments, message):
    with pytest.raises(InputError, match=message):
        search.main([*arguments, *([] if "--index" in arguments else ["--index", str(shop_index)])])


def test_health_names_the_index(client):
    answer = client.get("/health").json()
    assert answer["status"] == "ok" and answer["kind"] == "flat" and answer["rows"] == 160


def test_one_title_and_several_titles(client, matcher):
    title = matcher.index.catalogue["title"].iloc[0]
    one = client.post("/match", json={"title": title, "k": 2}).json()["results"]
    several = client.post("/match", json={"title": [title, "camera"], "k": 2}).json()["results"]
    assert (
        len(one) == 1 and len(one[0]["matches"]) == 2 and [r["title"] for r in several] == [title, "camera"]
    )
    assert one[0]["matches"][0]["id"] == several[0]["matches"][0]["id"]
    assert set(one[0]["matches"][0]) >= {"id", "title", "cosine", "probability", "confidence", "price"}


def test_a_category_limits_the_answer(client):
    answer = client.post("/match", json={"title": "anything", "k": 50, "category": "PHOTO"})
    assert {match["category"] for match in answer.json()["results"][0]["matches"]} == {"photo"}


def test_k_larger_than_the_catalogue_returns_every_record(matcher):
    with client_of(matcher, ServeSettings(max_k=10_000)) as client:
        answer = client.post("/match", json={"title": "tv", "k": 9_999})
    assert len(answer.json()["results"][0]["matches"]) == 160


def test_the_versioned_endpoints_answer_the_same(client):
    one = client.post("/v1/match", json={"title": "camera", "k": 2}).json()
    several = client.post("/v1/matches", json={"titles": ["tv", "camera"], "k": 2}).json()
    old = client.post("/match", json={"title": ["tv", "camera"], "k": 2}).json()
    assert one["title"] == "camera"
    expected = [[match["id"] for match in result["matches"]] for result in old["results"]]
    assert [[match["id"] for match in result["matches"]] for result in several["results"]] == expected
    assert [match["id"] for match in one["matches"]] == expected[1]


def test_one_bad_category_spoils_no_other_request(matcher):
    """Requests that arrive together share a batch."""
    settings = ServeSettings(wait_ms=200)
    with client_of(matcher, settings) as client, ThreadPoolExecutor(2) as threads:
        bad = threads.submit(client.post, "/v1/match", json={"title": "tv", "category": "shoes"})
        good = threads.submit(client.post, "/v1/match", json={"title": "tv", "category": "photo"})
        assert (bad.result().status_code, good.result().status_code) == (422, 200)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"title": "tv", "k": NaN}', 400, "NaN is not a JSON value"),
        (b'{"title": "tv", "k": -Infinity}', 400, "-Infinity is not a JSON value"),
        (b'{"title": "tv"', 400, "the body is not JSON"),
        (b"", 400, "the body is not JSON"),
        (b'{"title": "caf\xe9"}', 400, "the body is not UTF-8 (byte 14)"),
        (b"[" * 15_000, 400, "the body is not JSON"),
        (b'["tv"]', 422, "the body: Input should be a valid dictionary"),
        (b"{}", 422, "title: Field required"),
        (b'{"title": 7}', 422, "title: Input should be a valid string"),
        (b'{"title": ["tv", null]}', 422, "title"),
        (b'{"title": []}', 422, "title: 0 titles; 1 to 4 are allowed"),
        (b'{"title": ["a", "b", "c", "d", "e"]}', 422, "title: 5 titles; 1 to 4 are allowed"),
        (b'{"title": " "}', 422, "title 0: it is empty"),
        (b'{"title": ["tv", "\\ud800"]}', 422, "title 1: it holds half of a surrogate pair"),
        (b'{"title": "tv", "k": 0}', 422, "k: Input should be greater than or equal to 1"),
        (b'{"title": "tv", "k": 51}', 422, "k: 51; at most 50 is allowed"),
        (b'{"title": "tv", "k": 2.5}', 422, "k: Input should be a valid integer"),
        (b'{"title": "tv", "k": "5"}', 422, "k: Input should be a valid integer"),
        (b'{"title": "tv", "limit": 5}', 422, "limit: Extra inputs are not permitted"),
        (b'{"title": "tv", "category": "shoes"}', 422, "category 'shoes' is not in this catalogue"),
    ],
)  # fmt: skip
def test_bad_requests_get_one_clear_sentence(client, body, status, message):
    answer = client.post("/match", content=body)
    assert (answer.status_code, message in answer.json()["detail"]) == (status, True), answer.text


def test_a_title_of_100_000_characters_is_refused_by_either_limit(client, matcher):
    title = "x" * 100_000
    answer = client.post("/match", json={"title": title})
    assert answer.status_code == 413 and "larger than 20000 bytes" in answer.json()["detail"]
    with client_of(matcher, ServeSettings(max_body_bytes=10**6)) as roomy:
        answer = roomy.post("/match", json={"title": title})
    assert answer.status_code == 422 and "100000 characters; at most 2000" in answer.json()["detail"]


def test_a_body_without_a_length_is_still_limited(client):
    def chunks():
        for _ in range(1000):
            yield b"x" * 1000

    assert client.post("/match", content=chunks()).status_code == 413


def test_the_schema_describes_the_request(client):
    schema = client.get("/openapi.json").json()["paths"]["/match"]["post"]["requestBody"]
    assert "title" in json.dumps(schema)
