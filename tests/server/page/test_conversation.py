"""Questions, streamed answers, errors, and the stop button."""

from __future__ import annotations

import base64
import itertools
import json
import threading
import time
from pathlib import Path

import pytest

from tests.server.page.browser import Page, webdriver
from tests.server.page.stub_server import (
    PATIENCE,
    TIMINGS,
    Reply,
    answer_with_pyramid,
    begin_and_wait,
)

HTML_MESSAGE = "bad <img src=x onerror=\"document.title='run'\"> <b>value</b>"


def test_answer_streams_in(page: Page) -> None:
    more = threading.Event()

    def answer(reply: Reply) -> None:
        reply.text("A <b>größer")
        more.wait(PATIENCE)
        event = 'data: {"choices":[{"delta":{"content":"e</b> 猫\\n& dog"},"finish_reason":"length"}]}\n\n'.encode()
        cuts = [0, 3, event.index("猫".encode()) + 1, len(event) - 1, len(event)]  # in a word, a character, a line end
        for begin, end in itertools.pairwise(cuts):
            reply.write(event[begin:end])
            time.sleep(0.1)  # or the browser may see the parts as one
        reply.event({"choices": [], "pyramid": None, "timings": TIMINGS})
        reply.done()

    page.server.answer = answer
    page.ask("Which?")
    page.wait(lambda: page.text("#answer") == "A <b>größer")
    assert page.find("#answer").get_attribute("aria-busy") == "true"
    more.set()
    page.wait_for_end()
    assert page.text("#answer") == "A <b>größere</b> 猫\n& dog"
    assert "cut off" in page.text("#status")
    assert page.texts("dd") == ["170 ms", "1.23 s"]
    assert not page.find("#pyramid").is_displayed()


@pytest.mark.parametrize("pieces", [[" cat", " and dog"], [" ", "\n", " cat", " and dog"], ["cat", " and dog"]])
def test_an_answer_begins_without_its_space(page: Page, pieces: list[str]) -> None:
    def answer(reply: Reply) -> None:
        for piece in pieces:
            reply.text(piece)
        reply.done()

    page.server.answer = answer
    page.ask_and_wait()
    assert page.run("return document.getElementById('answer').textContent") == "cat and dog"


def test_request_carries_image_and_options(page: Page, wide_image: Path) -> None:
    page.choose(wide_image)
    page.find("summary").click()
    for name, value in {"max-tokens": "7", "temperature": "0.25", "route": "2,, 0", "key": "secret"}.items():
        page.find(f"#{name}").clear()
        page.find(f"#{name}").send_keys(value)
    page.find("#bias").send_keys(webdriver.Keys.LEFT * 3)
    page.ask_and_wait("What is it?")
    url = f"data:image/png;base64,{base64.b64encode(wide_image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    assert page.server.questions == [
        {
            "model": "stub-model",
            "stream": True,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 7,
            "temperature": 0.25,
            "router_bias": -1.5,
            "route": [2, None, 0],
        }
    ]
    assert page.server.keys == ["Bearer secret"]
    assert page.run("return localStorage.length + sessionStorage.length + document.cookie.length") == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (json.dumps({"error": {"message": HTML_MESSAGE}}).encode(), HTML_MESSAGE),
        (b"<h1>not ours</h1>", "The server answered 400 Bad Request."),
    ],
    ids=["API", "proxy"],
)
def test_error_is_text(page: Page, body: bytes, message: str) -> None:
    page.server.answer = lambda reply: reply.error(400, body)
    page.ask_and_wait()
    assert page.text("#error") == message
    assert page.find("#error").get_attribute("role") == "alert"
    assert page.run("return document.querySelectorAll('#error *').length") == 0
    assert page.driver.title == "dpn_rt"
    page.server.answer = lambda reply: answer_with_pyramid(reply)
    page.ask_and_wait()
    assert not page.find("#error").is_displayed()


def test_error_in_the_middle_keeps_the_beginning(page: Page) -> None:
    def answer(reply: Reply) -> None:
        reply.text("The beginning")
        reply.event({"error": {"message": HTML_MESSAGE}})
        reply.done()

    page.server.answer = answer
    page.ask_and_wait()
    assert (page.text("#answer"), page.text("#error")) == ("The beginning", HTML_MESSAGE)


def test_cut_connection_is_an_error(page: Page) -> None:
    page.server.answer = lambda reply: reply.text("The beginning")
    page.ask_and_wait()
    assert page.text("#answer") == "The beginning"
    assert "ended before the answer was complete" in page.text("#error")


def test_stop_closes_the_connection(page: Page) -> None:
    page.server.answer = begin_and_wait
    assert not page.find("#stop").is_displayed()
    page.ask()
    page.wait(lambda: page.text("#answer") == "The beginning")
    page.find("#ask").click()  # without effect while an answer arrives
    page.find("#stop").click()
    assert page.server.client_left.wait(PATIENCE)
    page.wait_for_end()
    assert (page.text("#answer"), page.text("#status")) == ("The beginning", "Stopped.")
    assert not page.find("#error").is_displayed()
    assert not page.find("#stop").is_displayed()
    assert len(page.server.questions) == 1
