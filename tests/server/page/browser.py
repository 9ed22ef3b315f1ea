"""The page in a browser, as a reader handles it."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver

from tests.server.page.stub_server import PATIENCE, StubServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
"""Debian: packages chromium and chromium-driver."""


class Page:
    """The page in a browser, as a reader handles it."""

    def __init__(self, driver: Any, server: StubServer) -> None:
        self.driver = driver
        self.server = server

    def open(self, path: str = "/") -> None:
        self.driver.get(self.server.url + path)
        self.wait(lambda: self.text("#model") == "stub-model")

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def texts(self, selector: str) -> list[str]:
        return [item.text for item in self.driver.find_elements("css selector", selector)]

    def run(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def run_async(self, script: str, *args: Any) -> Any:
        """The result of `script`, which is the body of an async function."""
        wrapped = f"const done = arguments[arguments.length - 1]; (async () => {{ {script} }})().then(done, done)"
        return self.driver.execute_async_script(wrapped, *args)

    def type(self, *keys: str) -> None:
        """Types into the focused element."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    @property
    def focused(self) -> str:
        return str(self.run("return document.activeElement.id || document.activeElement.localName"))

    def tab_to(self, name: str) -> None:
        for _ in range(20):
            self.type(webdriver.Keys.TAB)
            if self.focused == name:
                return
        raise AssertionError(f"the tab key does not reach {name}")

    def choose(self, path: Path) -> None:
        self.find("#file").send_keys(str(path))
        self.wait(lambda: self.text("#file-name") == path.name)

    def drop(self, *files: tuple[str, bytes]) -> None:
        """Files with these names and contents, onto the place for the image."""
        script = """
            const [target, files] = arguments;
            const data = new DataTransfer();
            for (const [name, text] of files) {
                const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
                data.items.add(new File([bytes], name, { type: "image/png" }));
            }
            target.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: data }));
        """
        encoded = [[name, base64.b64encode(content).decode()] for name, content in files]
        self.run(script, self.find("#drop"), encoded)

    def set(self, **values: str) -> None:
        """Fields by their ids, with _ for -."""
        for name, value in values.items():
            field = self.find(f"#{name.replace('_', '-')}")
            field.clear()
            field.send_keys(value)

    def problem(self, field: str) -> str:
        """What stands beside a field as its problem; empty if nothing does."""
        return self.text(f"#{field}-problem")

    def ask(self, question: str = "What is it?") -> None:
        self.find("#question").send_keys(question, webdriver.Keys.ENTER)

    def ask_and_wait(self, question: str = "What is it?") -> None:
        self.ask(question)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        self.wait(lambda: self.find("#answer").get_attribute("aria-busy") == "false")

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited {PATIENCE} s; the page says: {self.text('body')}"
            time.sleep(0.02)

    def emulate(self, width: int = 1000, **media: str) -> None:
        """Width of the viewport in pixels; media features with _ for -."""
        size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
