"""A browser for all tests, a page and a picture for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.server.page.browser import CHROMEDRIVER, CHROMIUM, Page, webdriver
from tests.server.page.stub_server import PATIENCE, serving
from tests.skips import NO_BROWSER

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(scope="package")
def driver() -> Iterator[Any]:
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip(NO_BROWSER)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # chromium has none for root
    for argument in arguments:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    chrome.set_script_timeout(PATIENCE)
    yield chrome
    chrome.quit()


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    with serving() as server:
        page = Page(driver, server)
        page.emulate()
        page.open()
        yield page
        driver.get("about:blank")


@pytest.fixture
def wide_image(tmp_path: Path) -> Path:
    """Twice as wide as high; the left half red, the right half blue."""
    image = Image.new("RGB", (80, 40), RED)
    image.paste(BLUE, (40, 0, 80, 40))
    image.save(tmp_path / "wide.png")
    return tmp_path / "wide.png"
