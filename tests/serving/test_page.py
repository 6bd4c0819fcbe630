"""The page in a real browser, over the real service.

A picture of the page for the README, made over any saved system:

    PAGE_MODEL=demo PAGE_ROW=3 PAGE_SCREENSHOT=docs/images/price_page.png \\
        pytest -n 0 tests/serving/test_page.py -k screenshot
"""

import io
import os
import shutil
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from contracts.files import read_json
from contracts.workspace import Workspace
from studies.benchmarks.service_process import running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
TOKEN = "open-sesame"
SECONDS = 60
"""How long a test waits for the page."""
WIDE, NARROW = 1280, 360
"""Widths in CSS pixels: a desk and a small phone."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no browser: apt-get install --no-install-recommends chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def service(picture_system, tmp_path_factory):
    flags = [
        "--model",
        str(picture_system),
        "--jobs",
        str(tmp_path_factory.mktemp("jobs")),
        "--device",
        "cpu",
    ]
    with running("serving.api", flags) as service:
        yield service


@pytest.fixture(scope="module")
def guarded_service(picture_system, tmp_path_factory):
    """A service that wants a token."""
    flags = [
        "--model",
        str(picture_system),
        "--jobs",
        str(tmp_path_factory.mktemp("jobs")),
        "--device",
        "cpu",
    ]
    with running("serving.api", flags, environment={"PRICE_TOKEN": TOKEN}) as service:
        yield service


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.add_argument("--headless=new")
    # chromium refuses to run as root with its sandbox, and /dev/shm is small in containers
    options.add_argument("--no-sandbox")
    options.add_argument("--disable-dev-shm-usage")
    # a camera that shows a test card, and is allowed
    options.add_argument("--use-fake-device-for-media-stream")
    options.add_argument("--use-fake-ui-for-media-stream")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)}
    )
    yield driver
    driver.quit()


class Page:
    """What a person does with the page and sees on it."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        driver.execute_script("localStorage.clear()")
        driver.get_log("browser")  # forgets what earlier pages logged
        self.view(WIDE)
        driver.refresh()
        self.until(lambda: self.all("#fields [name]"))

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def until(self, condition):
        return WebDriverWait(self.driver, SECONDS).until(lambda driver: condition())

    def view(self, width, theme="light", height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})

    def describe(self, text):
        first = self.one("#fields [name]")
        first.clear()
        first.send_keys(text)

    def ask(self):
        self.one("#submit").click()

    def priced(self):
        self.until(lambda: self.all("#price") and self.one("#answer").get_attribute("aria-busy") == "false")

    def errors(self):
        """What the console calls severe. A refused request is listed there, too, whatever the page does about it."""
        severe = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [message for message in severe if "the server responded with a status of 4" not in message]

    def sideways_scroll(self):
        return self.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")

    def focused(self):
        return self.driver.switch_to.active_element


@pytest.fixture
def page(browser, service):
    page = Page(browser, service.address)
    yield page
    assert page.errors() == []


@pytest.fixture
def guarded_page(browser, guarded_service):
    page = Page(browser, guarded_service.address)
    yield page
    assert page.errors() == []


@pytest.fixture(scope="module")
def picture(sample_workspace):
    return next((sample_workspace / "catalogue" / "images").iterdir())


@pytest.fixture(scope="module")
def product(sample_workspace):
    """Name of a product that the system does not know."""
    text = pd.read_csv(sample_workspace / "catalogue" / "test.csv")["catalog_content"][0]
    return text.split("\n")[0].removeprefix("Item Name: ")


def test_an_empty_form_says_what_to_do(page):
    page.ask()
    assert page.text("#fields .error").endswith("Write what it is, or add a picture.")
    field = page.focused()
    assert field.get_attribute("aria-invalid") == "true"
    assert field.get_attribute("aria-describedby") == page.one("#fields .error").get_attribute("id")


def test_a_text_and_a_picture_give_price_interval_reasons_and_neighbours(page, product, picture):
    page.describe(product)
    page.one("#picture").send_keys(str(picture))
    assert picture.name in page.text("#picture-name")
    page.ask()
    page.priced()

    answer = page.driver.execute_script("return answer")
    assert page.text("#price .unseen") == f"${answer['price']:,.2f}"
    for interval in answer["intervals"].values():
        assert f"${interval['low']:,.2f} to ${interval['high']:,.2f}" in page.text("#range")
    assert "picture" not in answer["missing"]
    assert f"${answer['price']:,.2f}" in page.one("#status").get_property("textContent")

    neighbours = answer["neighbours"]
    assert len(neighbours) == 5
    rows = page.all("#nearest li")
    for row, neighbour in zip(rows, neighbours, strict=True):
        assert f"${neighbour['price']:,.2f}" in row.text
    assert len(page.all("#reasons .effects li")) > 2
    page.until(lambda: page.all("#nearest img"))


def test_the_chart_is_logarithmic(page, product):
    page.describe(product)
    page.ask()
    page.priced()
    answer = page.driver.execute_script("return answer")
    prices = [neighbour["price"] for neighbour in answer["neighbours"]]
    prices.append(answer["price"])
    places = [float(dot.get_attribute("cx")) for dot in page.all("#chart .dot")]
    places.append(float(page.one("#chart .middle").get_attribute("x1")))
    slope, start = np.polyfit(np.log(prices), places, 1)
    assert slope > 0
    np.testing.assert_allclose(start + slope * np.log(prices), places, atol=0.1)
    band = page.one("#chart .narrow")
    low = float(band.get_attribute("x"))
    narrow = answer["intervals"]["80"]
    np.testing.assert_allclose(low, start + slope * np.log(narrow["low"]), atol=0.1)
    high = low + float(band.get_attribute("width"))
    np.testing.assert_allclose(high, start + slope * np.log(narrow["high"]), atol=0.1)


def test_a_broken_picture_is_named(page, product, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 this is not the rest of a jpeg")
    page.describe(product)
    page.one("#picture").send_keys(str(broken))
    page.ask()
    page.until(lambda: page.text("#field-picture-error"))
    assert "picture" in page.text("#field-picture-error").lower()
    assert page.focused().get_attribute("id") == "picture-remove"
    # without it the product has a price
    page.one("#picture-remove").click()
    assert not page.one("#field-picture-error").is_displayed()
    page.ask()
    page.priced()
    assert "picture" in page.text(".warnings")


GIVE_FILE = """
const [kind, target, bytes] = arguments;
const content = new DataTransfer();
content.items.add(new File([Uint8Array.from(bytes)], "given.png", {type: "image/png"}));
const event = kind === "paste"
    ? new ClipboardEvent("paste", {clipboardData: content, bubbles: true, cancelable: true})
    : new DragEvent("drop", {dataTransfer: content, bubbles: true, cancelable: true});
document.querySelector(target).dispatchEvent(event);
"""


@pytest.mark.parametrize(("kind", "target"), [("paste", "body"), ("drop", "#picture-drop")])
def test_a_picture_can_be_pasted_and_dropped(page, kind, target):
    drawn = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 30)).save(drawn, "PNG")
    page.driver.execute_script(GIVE_FILE, kind, target, list(drawn.getvalue()))
    assert page.text("#picture-name").startswith("given.png")
    page.ask()
    page.priced()
    assert "picture" not in page.driver.execute_script("return answer.missing")


def test_a_picture_can_come_from_the_camera(page):
    page.one("#picture-camera").click()
    page.until(lambda: page.driver.execute_script("return document.querySelector('#camera-view').videoWidth"))
    page.one("#camera-shoot").click()
    page.until(lambda: page.one("#picture-name").is_displayed())
    assert page.text("#picture-name").startswith("photo.jpg")
    assert not page.one("#camera").is_displayed()
    page.ask()
    page.priced()
    assert "picture" not in page.driver.execute_script("return answer.missing")


HOSTILE = "<img src=x onerror=alert(1)>"


def hostile(content):
    """The same answer with markup in the place of every text."""
    if isinstance(content, dict):
        return {name: hostile(value) for name, value in content.items()}
    if isinstance(content, list):
        return [hostile(value) for value in content]
    return HOSTILE if isinstance(content, str) else content


def test_text_from_data_is_never_markup(page, product, picture, tmp_path):
    named = tmp_path / f"{HOSTILE}.jpg"
    named.write_bytes(picture.read_bytes())
    page.describe(f"{product} {HOSTILE}")
    page.one("#picture").send_keys(str(named))
    assert HOSTILE in page.text("#picture-name")
    page.ask()
    page.priced()
    answer = page.driver.execute_script("return answer")
    answer["warnings"].append("a warning")
    page.driver.execute_script("showAnswer(arguments[0])", hostile(answer) | {"currency": "$"})
    for place in (".warnings", "#reasons", "#nearest"):
        assert HOSTILE in page.text(place), place
    page.driver.execute_script("showError(arguments[0])", HOSTILE)
    assert page.text("#form-error") == HOSTILE
    assert page.all("img[src='x']") == []


def catalogue_file(sample_workspace, folder, rows):
    """A table with `rows` products, as a shop would upload it; the seventh has no text."""
    products = pd.read_csv(sample_workspace / "catalogue" / "train.csv", dtype=str).head(rows)
    products.loc[6, "catalog_content"] = ""
    path = folder / "shop.csv"
    products.drop(columns="price").to_csv(path, index=False)
    return path, products


def test_a_catalogue_is_priced_and_downloaded(page, sample_workspace, tmp_path, downloads):
    path, products = catalogue_file(sample_workspace, tmp_path, 200)
    page.one("#tab-catalogue").click()
    page.one("#table").send_keys(str(path))
    page.until(lambda: page.one("#job-download").is_displayed())
    assert page.text("#job-file") == "shop.csv"
    assert page.text("#job-state") == "Done: 199 of 200 rows have a price."
    assert page.text("#job-bad-title") == "1 row without a price"
    row, sample_id, reason = [cell.text for cell in page.all("#job-bad-rows td")]
    assert (row, sample_id) == ("7", products["sample_id"][6])
    assert "text" in reason
    page.one("#job-download").click()
    page.until(lambda: list(downloads.glob("*.csv")))
    (result,) = downloads.glob("*.csv")
    prices = pd.read_csv(result, dtype={"sample_id": str})
    assert prices["sample_id"].tolist() == products["sample_id"].tolist()
    assert prices.index[prices["price"].isna()].tolist() == [6]
    priced = prices.dropna(subset="price")
    assert (priced["low_80"] < priced["price"]).all()
    assert (priced["price"] < priced["high_80"]).all()
    # the page finds the job again after it was closed
    page.driver.refresh()
    page.until(lambda: page.one("#job-download").get_property("hidden") is False)


def test_a_catalogue_that_cannot_be_read_is_refused_in_a_sentence(page, tmp_path):
    page.one("#tab-catalogue").click()
    letter = tmp_path / "letter.docx"
    letter.write_text("Dear all")
    page.one("#table").send_keys(str(letter))
    assert page.text("#table-error").startswith("letter.docx is no table")


def test_a_job_can_be_cancelled(page, sample_workspace, tmp_path):
    path, _ = catalogue_file(sample_workspace, tmp_path, 400)
    page.one("#tab-catalogue").click()
    page.one("#table").send_keys(str(path))
    page.until(lambda: page.driver.execute_script("return job && job.id"))
    name = page.driver.execute_script("return job.id")
    page.one("#job-cancel").click()
    page.until(lambda: page.one("#table-drop").is_displayed())
    status = "return fetch(arguments[0]).then((response) => response.status)"
    assert page.driver.execute_script(status, f"/v1/jobs/{name}") == 404


def test_a_wrong_token_is_refused_beside_the_token(guarded_page, product):
    page = guarded_page
    page.describe(product)
    page.one("#token").send_keys("wrong")
    page.ask()
    page.until(lambda: page.one("#token-error").is_displayed())
    assert "token" in page.text("#token-error")
    assert page.focused().get_attribute("id") == "token"
    assert not page.all("#price")
    page.one("#token").clear()
    page.one("#token").send_keys(TOKEN)
    page.ask()
    page.priced()
    assert not page.one("#token-error").is_displayed()


def test_a_wrong_token_uploads_no_catalogue(guarded_page, sample_workspace, tmp_path):
    page = guarded_page
    path, _ = catalogue_file(sample_workspace, tmp_path, 10)
    page.one("#token").send_keys("wrong")
    page.one("#tab-catalogue").click()
    page.one("#table").send_keys(str(path))
    page.until(lambda: page.one("#token-error").is_displayed())
    assert page.one("#table-drop").is_displayed()


def test_everything_is_reached_and_seen_with_the_keyboard(page, product):
    def press(*keys):
        webdriver.ActionChains(page.driver).send_keys(*keys).perform()

    outline = "return getComputedStyle(arguments[0]).outlineStyle"
    reached = []
    while not reached or reached[-1] != "submit":
        press(Keys.TAB)
        element = page.focused()
        reached.append(element.get_attribute("id"))
        # the file input is out of sight, so its label carries the outline
        marked = page.one("#picture + label") if reached[-1] == "picture" else element
        assert page.driver.execute_script(outline, marked) != "none", reached[-1]
        if element.get_attribute("name") and len(reached) < 6:
            press(product)
        assert len(reached) < 30, reached
    assert {"theme", "tab-product", "picture", "picture-camera"} <= set(reached)
    press(Keys.ENTER)
    page.priced()

    tab = page.one("#tab-product")
    page.driver.execute_script("arguments[0].focus()", tab)
    press(Keys.ARROW_RIGHT)
    assert page.focused().get_attribute("id") == "tab-catalogue"
    assert page.one("#panel-catalogue").is_displayed()
    press(Keys.TAB)
    assert page.focused().get_attribute("id") == "table"


def test_nothing_scrolls_sideways_on_a_small_phone(page, product):
    page.view(NARROW)
    assert page.sideways_scroll() <= 0
    page.describe(product + " " + "Donaudampfschifffahrtsgesellschaftskapitän" * 3)
    page.ask()
    page.priced()
    assert page.sideways_scroll() <= 0
    page.one("#tab-catalogue").click()
    assert page.sideways_scroll() <= 0


def test_the_theme_follows_the_system_until_one_is_chosen(page):
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.driver.execute_script(ground)
    page.view(WIDE, "dark")
    dark = page.driver.execute_script(ground)
    assert light != dark
    page.one("#theme").click()
    assert page.driver.execute_script(ground) == light
    page.driver.refresh()
    page.until(lambda: page.all("#fields [name]"))
    assert page.driver.execute_script(ground) == light


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_axe_finds_nothing_serious(page, product, picture, theme, width):
    page.view(width, theme)
    page.ask()  # with the error of the empty form
    assert serious(page) == []
    page.describe(product)
    page.one("#picture").send_keys(str(picture))
    page.ask()
    page.priced()
    for details in page.all("details"):
        details.click()
    assert serious(page) == []
    page.one("#tab-catalogue").click()
    assert serious(page) == []


def serious(page):
    """Rule and element of each finding of axe-core that is at least serious."""
    axe = files("selenium_axe_python").joinpath("axe-core", "axe.min.js").read_text("utf-8")
    page.driver.execute_script(axe)
    found = page.driver.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    listed = []
    for violation in found["violations"]:
        if violation["impact"] in ("serious", "critical"):
            listed += [(violation["id"], node["html"][:200]) for node in violation["nodes"]]
    return listed


@pytest.mark.skipif("PAGE_SCREENSHOT" not in os.environ, reason="PAGE_SCREENSHOT names no file to write")
def test_screenshot(browser, tmp_path):
    model = os.environ["PAGE_MODEL"]
    with running("serving.api", ["--model", model, "--jobs", str(tmp_path), "--device", "cpu"]) as service:
        page = Page(browser, service.address)
        prepared = Workspace(model).prepared("test")
        product = prepared[prepared["image"] != ""].iloc[int(os.environ.get("PAGE_ROW", "0"))]
        page.describe(product["entity_name"])
        if page.all("#picture"):
            images = Path(read_json(f"{model}/data/catalog.json")["images_folder"])
            page.one("#picture").send_keys(str(images / product["image"]))
        page.ask()
        page.priced()
        page.until(lambda: not page.all("#nearest span.thumb") or page.all("#nearest img"))
        webdriver.ActionChains(page.driver).move_to_element(page.one("h1")).perform()  # off the button
        time.sleep(1)  # pictures and transitions
        page.view(WIDE, height=page.one("html").size["height"])
        page.driver.save_screenshot(os.environ["PAGE_SCREENSHOT"])
