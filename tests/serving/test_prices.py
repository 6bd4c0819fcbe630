"""The price service over a small saved system that reads texts and pictures."""

import io
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient
from PIL import Image

from contracts.workspace import Workspace
from pricing import PriceModel
from pricing.export import export
from serving.api import create_service
from serving.app import TOKEN
from serving.config import PriceServiceSettings

TEA = {"title": "Organic Green Tea, 12 oz", "value": "12", "unit": "Ounce"}


def service_of(root, folder, **settings):
    return create_service(PriceServiceSettings(model=str(root), jobs=folder, device="cpu", **settings))


@pytest.fixture(scope="module")
def service(picture_system, tmp_path_factory):
    return service_of(picture_system, tmp_path_factory.mktemp("jobs"), picture_urls=True)


@pytest.fixture(scope="module")
def desk(service):
    return service.app.state.desk


@pytest.fixture(scope="module")
def client(service):
    with TestClient(service.app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def model(picture_system):
    return PriceModel.load(picture_system, device="cpu")


def picture(size=(60, 40), kind="PNG"):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(content, kind)
    return content.getvalue()


def test_a_price_is_that_of_the_model(client, model):
    answer = client.post("/v1/price", data=TEA)
    assert answer.status_code == 200, answer.text
    price = answer.json()
    text = "Item Name: Organic Green Tea, 12 oz\nValue: 12\nUnit: Ounce"
    expected = model.predict_one(text)
    assert price["price"] == pytest.approx(expected["price"], rel=1e-3)
    assert price["intervals"]["95"]["high"] == pytest.approx(expected["high_95"], rel=1e-3)
    low, high = price["intervals"]["80"].values()
    assert low < price["price"] < high
    assert price["currency"] == "$" and price["missing"] == ["picture"]
    assert price["warnings"][0] == "Without a usable picture, the price rests on the text alone."
    assert price == client.post("/v1/price", data={"text": text}).json()


def test_an_answer_is_explained_and_has_known_products_beside_it(client, picture_system):
    known = Workspace(picture_system).prepared("train").set_index("sample_id")
    product = known.iloc[7]
    price = client.post("/v1/price", data={"text": product["catalog_content"]}).json()
    neighbours = price["neighbours"]
    assert len(neighbours) == 5
    assert neighbours[0]["id"] == product.name and neighbours[0]["price"] == product["price"]
    assert neighbours[0]["similarity"] == pytest.approx(1, abs=1e-2)
    explanation = price["explanation"]
    assert explanation["members"][0]["weight"] == 1.0
    words = [effect["word"] for effect in explanation["words"]]
    assert 0 < len(words) <= 8 and set(words) <= set(product["entity_name"].replace(",", " ").split())
    assert [field["name"] for field in explanation["fields"]] == ["amount"]
    short = client.post("/v1/price", data={"text": product["catalog_content"], "explain": "false"}).json()
    assert short["explanation"] is None and short["price"] == pytest.approx(price["price"])


def test_a_picture_changes_the_price_and_is_a_field_of_the_explanation(client):
    without = client.post("/v1/price", data=TEA).json()
    price = client.post("/v1/price", data=TEA, files={"picture": picture()}).json()
    assert price["missing"] == [] and price["price"] != without["price"]
    shares = {modality["name"]: modality["share"] for modality in price["explanation"]["modalities"]}
    assert set(shares) == {"siglip_text", "siglip_image"} and sum(shares.values()) == pytest.approx(
        1, abs=1e-3
    )
    assert without["explanation"]["modalities"] == [{"name": "siglip_text", "share": 1.0}]
    factors = {field["name"]: field["factor"] for field in price["explanation"]["fields"]}
    assert factors["picture"] == pytest.approx(price["price"] / without["price"], rel=1e-2)


def test_a_picture_alone_has_a_price(client):
    price = client.post("/v1/price", files={"picture": picture(kind="JPEG")}).json()
    assert price["price"] > 0 and set(price["missing"]) == {"text", "amount"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<svg onload=alert(1)>", "not a picture"),
        (picture()[:600], "damaged"),
        (picture(kind="JPEG")[:1500], "damaged"),
    ],
)
def test_a_broken_picture_is_named_and_leaves_no_file(client, desk, content, reason):
    answer = client.post("/v1/price", data=TEA, files={"picture": content})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(f"picture: {reason}")
    scratch = Path(desk.pictures.scratch.name)
    assert list(scratch.iterdir()) == []


def test_pictures_do_not_stay(client, desk):
    assert client.post("/v1/price", data=TEA, files={"picture": picture()}).status_code == 200
    assert list(Path(desk.pictures.scratch.name).iterdir()) == []


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"data": {}, "files": {"picture": b""}}, 422, "title: describe the product"),
        ({"data": {"title": "tea", "colour": "red"}}, 422, "colour: Extra inputs are not permitted"),
        ({"data": {"title": ["tea", "coffee"]}}, 422, "title: it is given twice"),
        ({"files": {"title": b"tea"}}, 422, "title: it is a file; only picture may be one"),
        ({"data": {"title": "tea", "picture": "tea.jpg"}}, 422, "picture: send a file"),
        ({"data": {"title": "tea", "explain": "perhaps"}}, 422, "explain: write true or false"),
        ({"data": {"title": "x" * 20_001}}, 422, "title: 20001 characters; at most 20000 are allowed"),
        ({"data": {"title": "x" * 90_000}, "files": {"picture": b"x"}}, 400, "Part exceeded maximum size"),
        ({"json": {"title": "tea"}}, 415, "send multipart/form-data"),
        ({"content": b"x" * (9 << 20)}, 413, "the body is larger than"),
    ],
)
def test_a_bad_request_gets_one_sentence(client, request_, status, message):
    answer = client.post("/v1/price", **request_)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]


def test_several_products_keep_their_order(client):
    titles = [f"Organic Tea, {count} oz" for count in range(1, 71)]
    answer = client.post(
        "/v1/prices", json={"products": [{"title": title, "value": 2.5} for title in titles]}
    )
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    single = client.post("/v1/price", data={"title": titles[50], "value": "2.5", "explain": "false"}).json()
    assert len(results) == 70 and results[50]["price"] == pytest.approx(single["price"], rel=1e-3)
    assert all(result["explanation"] is None for result in results)
    explained = client.post("/v1/prices", json={"products": [{"title": "Tea"}], "explain": True}).json()
    assert explained["results"][0]["explanation"]["words"][0]["word"] == "Tea"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"products": []}, "products: List should have at least 1 item"),
        ({"products": [{"title": "tea"}] * 257}, "products: List should have at most 256 items"),
        ({"products": [{"title": "tea"}, {}]}, "products.1.title: describe the product"),
        ({"products": [{"title": "tea"}, {"colour": 1}]}, "products.1.colour: Extra inputs"),
        ({"products": [{"title": {"deep": 1}}]}, "products.0.title: Input should be"),
        ({"products": [{"title": "\ud800"}]}, "products.0.title: it holds half of a surrogate pair"),
        ({"products": [{"title": "x" * 20_001}]}, "products.0.title: 20001 characters"),
        ({"products": [{"title": True}]}, "products.0.title: Input should be"),
    ],
)
def test_bad_products_are_named_by_number(client, content, message):
    import json

    body = json.dumps(content)
    answer = client.post("/v1/prices", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and message in answer.json()["detail"], answer.text


def test_a_number_beyond_all_floats_is_refused(client):
    body = b'{"products": [{"title": "tea", "value": 1e999}]}'
    answer = client.post("/v1/prices", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and "products.0.value" in answer.json()["detail"]


def test_the_page_learns_of_the_model(client):
    model = client.get("/v1/model").json()
    assert [column["name"] for column in model["columns"]][-1] == "picture"
    assert model["score"] == {
        "smape": 70.0, "standard_error": 2.0, "rows": 400, "coverage": {"80%": 0.8, "95%": 0.95}
    }  # fmt: skip
    assert model["reads_pictures"] and model["picture_urls"] and not model["token_required"]


def test_pictures_of_known_products_are_small_jpegs(client, picture_system):
    known = Workspace(picture_system).prepared("train")
    product = known[known["image"] != ""].iloc[0]
    price = client.post("/v1/price", data={"text": product["catalog_content"]}).json()
    path = price["neighbours"][0]["picture"]
    assert path == f"/v1/pictures/{product['sample_id']}"
    answer = client.get(path)
    assert answer.headers["content-type"] == "image/jpeg"
    shown = Image.open(io.BytesIO(answer.content))
    assert max(shown.size) <= 320
    for other in ("nobody", "..%2f..%2fcatalog.json", "%2e%2e", ""):
        assert client.get(f"/v1/pictures/{other}").status_code == 404


def test_a_token_guards_all_but_the_form_and_pictures_carry_a_key(picture_system, tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN, "s3cret")
    service = service_of(picture_system, tmp_path)
    with TestClient(service.app, base_url="http://127.0.0.1") as client:
        assert client.get("/v1/model").json()["token_required"]
        right = {"authorization": "Bearer s3cret"}
        for method, path in (
            ("POST", "/v1/price"),
            ("POST", "/v1/prices"),
            ("POST", "/v1/jobs"),
            ("GET", "/v1/jobs/a"),
        ):
            assert client.request(method, path).status_code == 401, path
            assert client.request(method, path, headers=right).status_code != 401, path
        known = Workspace(picture_system).prepared("train")
        text = known.loc[known["image"] != "", "catalog_content"].iloc[0]
        picture = client.post("/v1/price", data={"text": text}, headers=right).json()["neighbours"][0][
            "picture"
        ]
        assert client.get(picture).status_code == 200  # as <img src> would ask
        assert client.get(picture.split("?")[0], headers=right).status_code == 200
        assert client.get(picture.split("?")[0]).status_code == 401
        assert client.get(picture[:-1] + ("0" if picture[-1] != "0" else "1")).status_code == 401


def test_an_address_is_fetched_and_checked_like_a_file(client, desk, monkeypatch):
    asked = []

    def fetch(address, path):
        asked.append(address)
        if "refused" in address:
            raise HTTPException(422, "picture_url: unreachable")
        path.write_bytes(picture())

    monkeypatch.setattr(desk.pictures, "fetch", fetch)
    price = client.post("/v1/price", data={**TEA, "picture_url": "https://shop.example/a.png"}).json()
    assert price["missing"] == [] and asked == ["https://shop.example/a.png"]
    refused = client.post("/v1/price", data={**TEA, "picture_url": "https://refused.example/"})
    assert refused.status_code == 422
    both = client.post(
        "/v1/price", data={**TEA, "picture_url": "https://a.example/"}, files={"picture": picture()}
    )
    assert both.status_code == 422 and "leave one of them out" in both.json()["detail"]


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:1/a.jpg", "http://[::1]/a.jpg", "http://169.254.169.254/", "file:///etc/passwd", "x"],
)
def test_addresses_inside_are_not_asked(client, address):
    """Numbers need no resolver, and the connection is refused before it is made."""
    answer = client.post("/v1/price", data={**TEA, "picture_url": address})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(("picture_url: not_public (", "picture_url: bad_link"))


def test_addresses_are_off_unless_they_are_asked_for(picture_system, tmp_path):
    with TestClient(service_of(picture_system, tmp_path).app, base_url="http://127.0.0.1") as client:
        answer = client.post("/v1/price", data={**TEA, "picture_url": "https://shop.example/a.png"})
        assert answer.status_code == 422 and "fetches no pictures" in answer.json()["detail"]
        assert "picture_url" not in str(client.get("/openapi.json").json()["paths"]["/v1/price"])


def test_a_system_without_known_products_has_no_neighbours(client, desk, monkeypatch):
    """As `pricing.export --no-known-products` makes it."""
    monkeypatch.setitem(desk.model.__dict__, "known_products", None)
    price = client.post("/v1/price", data=TEA).json()
    assert price["neighbours"] == [] and price["explanation"]["words"]


def test_a_product_far_from_all_known_ones_is_said_to_be(client, desk, monkeypatch):
    known = desk.model.known_products
    far = "The product resembles none of the known ones much, so the price is less certain than its interval says."
    monkeypatch.setitem(known.__dict__, "ordinary_similarity", -1.0)
    assert far not in client.post("/v1/price", data=TEA).json()["warnings"]
    monkeypatch.setitem(known.__dict__, "ordinary_similarity", 1.1)
    assert far in client.post("/v1/price", data=TEA).json()["warnings"]


def test_the_page_is_served_with_a_policy_for_its_own_scripts(client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "script-src 'sha256-" in answer.headers["content-security-policy"]
    assert "unsafe-inline" not in answer.headers["content-security-policy"]


def test_requests_that_arrive_together_are_priced_together(client, service, monkeypatch):
    sizes = []
    monkeypatch.setattr(service.batchers[0], "batch_sizes", sizes.append)
    started = threading.Barrier(12)

    def ask(number):
        started.wait()
        return client.post("/v1/price", data={"title": f"Tea {number}", "explain": "false"}).json()["price"]

    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(ask, range(12)))
    assert max(sizes) > 1 and sum(sizes) == 12
    alone = client.post("/v1/price", data={"title": "Tea 5", "explain": "false"}).json()["price"]
    assert together[5] == pytest.approx(alone, rel=1e-3)


def test_an_interval_without_end_is_a_number(client, desk, monkeypatch):
    ensemble = desk.model.ensemble
    prices = ensemble.prices

    def endless(*arguments):
        return prices(*arguments).assign(**{"high_95%": math.inf})

    monkeypatch.setattr(type(ensemble), "prices", lambda self, *arguments: endless(*arguments))
    assert client.post("/v1/price", data=TEA).json()["intervals"]["95"]["high"] == 1e12


def test_an_exported_system_is_served_like_its_workspace(picture_system, client, tmp_path):
    """An export keeps names and prices of the known products, and neither their pictures nor their facts."""
    export(picture_system, tmp_path / "exported")
    service = service_of(tmp_path / "exported", tmp_path / "jobs")
    with TestClient(service.app, base_url="http://127.0.0.1") as exported:
        answer = exported.post("/v1/price", data=TEA).json()
        told = exported.get("/v1/model").json()
    expected = client.post("/v1/price", data=TEA).json()
    assert answer["price"] == pytest.approx(expected["price"], rel=1e-4)
    assert [item["id"] for item in answer["neighbours"]] == [item["id"] for item in expected["neighbours"]]
    assert all(item["picture"] is None for item in answer["neighbours"])
    assert told["table_columns"] == ["sample_id", "catalog_content", "image_link"]
