"""The review page in a real browser, opened from a file."""

import shutil
import time

import pandas as pd
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from product_matching.monitor import read_reviewed
from product_matching.review import review_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no browser: apt-get install --no-install-recommends chromium chromium-driver",
    ),
]


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def test_a_person_marks_pairs_and_exports_the_labels(browser, tmp_path):
    hostile = "<img src=x onerror=\"document.title='broken in'\">"
    pairs = pd.DataFrame(
        {
            "left_id": ["a", 'b"1', "c,2"], "right_id": ["x", "y", "z"], "left": [hostile, "two", "three"],
            "right": ["one", "two", "three"], "probability": [0.5, 0.4, 0.3],
        }
    )  # fmt: skip
    (tmp_path / "review.html").write_text(review_page(pairs), encoding="utf-8")
    browser.get((tmp_path / "review.html").as_uri())
    items = browser.find_elements(By.CSS_SELECTOR, "#pairs li")
    assert len(items) == 3 and hostile in items[0].text and browser.title == "Review pairs"

    items[1].find_elements(By.TAG_NAME, "label")[1].click()  # different, by mouse
    items[2].send_keys("1")  # same, by keyboard
    items[2].send_keys(Keys.ARROW_UP)
    assert browser.switch_to.active_element == items[1]
    assert browser.find_element(By.ID, "count").text == "2 of 3 marked."

    browser.find_element(By.ID, "export").click()
    path = tmp_path / "labels.csv"
    until = time.monotonic() + 30
    while not path.is_file() and time.monotonic() < until:
        time.sleep(0.1)
    labels = read_reviewed(path)
    assert labels.to_numpy().tolist() == [['b"1', "y", False], ["c,2", "z", True]]
