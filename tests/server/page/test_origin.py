"""The page fetches nothing from other origins, and text of questions and answers never becomes HTML."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dpn_rt.server.page.document import page_text
from tests.server.page.browser import Page
from tests.server.page.stub_server import (
    WITHOUT_POLICY,
    answer_with_pyramid,
    serving,
)


def test_no_request_leaves_the_origin(page: Page, wide_image: Path) -> None:
    page.driver.get_log("performance")
    page.server.answer = answer_with_pyramid
    page.open()
    page.choose(wide_image)
    page.ask_and_wait()
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert f"{page.server.url}/v1/chat/completions" in urls
    assert [url for url in urls if not url.startswith((f"{page.server.url}/", "data:", "blob:"))] == []
    assert [path for path in page.server.paths if path not in ("/", "/v1/models", "/v1/chat/completions")] == []


def test_page_forbids_itself_other_origins(page: Page) -> None:
    page.open(WITHOUT_POLICY)
    with serving() as elsewhere:
        outcome = page.run_async(
            """
            const [url] = arguments;
            const image = new Image();
            const shown = new Promise((resolve) => { image.onload = image.onerror = resolve; });
            image.src = url;
            await shown;
            return await fetch(url, { mode: "no-cors" }).then(() => "fetched", () => "refused");
            """,
            elsewhere.url,
        )
        assert (outcome, elsewhere.paths) == ("refused", [])


def test_page_is_one_file_and_inserts_text_only() -> None:
    source = page_text()
    assert re.findall(r"https?://[^\"'\s]+", source) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", source)
