"""What cannot be sent is refused beside its field, in the page's own words, and nothing else is sent instead."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.server.page.browser import Page, webdriver
from tests.server.page.stub_server import answer_with_pyramid

KERNELS = [[[1, 1], [1, 2], [2, 2]], [[1, 1], [2, 2]]]


def content_of(page: Page) -> Any:
    return page.server.questions[-1]["messages"][0]["content"]


def url_of(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.mark.parametrize("has_image_before", [False, True])
def test_a_file_that_is_no_image_is_refused_until_it_is_removed(
    page: Page, wide_image: Path, has_image_before: bool
) -> None:
    if has_image_before:
        page.choose(wide_image)
    page.drop(("notes.png", b"no image"))
    page.wait(lambda: "notes.png is not an image that this browser can show" in page.problem("image"))
    assert page.text("#file-name") == "notes.png" and not page.find("#preview").is_displayed()
    for _ in range(2):
        page.ask()
        page.wait(lambda: "Not asked" in page.text("#status"))
        assert page.focused == "file" and "notes.png" in page.problem("image")
        assert page.find("#file").get_attribute("aria-invalid") == "true"
    assert page.server.questions == []
    page.find("#remove").click()
    page.wait(lambda: not page.problem("image"))
    page.find("#question").clear()
    page.ask_and_wait("Alone?")
    assert content_of(page) == "Alone?"
    page.drop(("notes.png", b"no image"))
    page.wait(lambda: bool(page.problem("image")))
    page.choose(wide_image)  # instead of it
    page.ask_and_wait()
    assert content_of(page)[0]["image_url"]["url"] == url_of(wide_image)


def test_two_files_are_not_one_image(page: Page, wide_image: Path) -> None:
    content = wide_image.read_bytes()
    page.drop(("a.png", content), ("b.png", content))
    page.wait(lambda: page.problem("image") == "These are 2 files: expected one image.")
    page.ask()
    page.wait(lambda: "Not asked" in page.text("#status"))
    assert page.server.questions == [] and page.text("#file-name") == "2 files"


@pytest.mark.parametrize("is_image", [True, False])
def test_what_is_sent_is_what_is_shown_then(page: Page, wide_image: Path, tmp_path: Path, is_image: bool) -> None:
    """Also where the image changes between Ask and the request."""
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(other)
    page.choose(wide_image)
    page.server.may_list_models.clear()
    page.ask()
    page.wait(lambda: page.find("#stop").is_displayed())
    if is_image:
        page.choose(other)
    else:
        page.drop(("notes.png", b"no image"))
        page.wait(lambda: bool(page.problem("image")))
    page.server.may_list_models.set()
    page.wait_for_end()
    if is_image:
        assert content_of(page)[0]["image_url"]["url"] == url_of(other)
    else:
        assert page.server.questions == [] and "Not asked" in page.text("#status")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("max-tokens", "0", "Expected a whole number from 1 on, or nothing."),
        ("max-tokens", "1.5", "Expected a whole number from 1 on, or nothing."),
        ("max-tokens", "e", "Expected a whole number from 1 on, or nothing."),
        ("temperature", "-1", "Expected a number from 0 on, or nothing."),
        ("route", "2,x", '"x" is not the number of a kernel, expected something like 2,2,2.'),
        ("route", "2", "The model has 2 boundaries, and these are 1: expected one number for each."),
        ("route", "0,1,0", "The model has 2 boundaries, and these are 3: expected one number for each."),
        ("route", ",2", "There is no kernel 2: expected 0 to 1."),
    ],
)
def test_a_field_that_cannot_be_sent(page: Page, field: str, value: str, problem: str) -> None:
    page.server.card["pooling_kernels"] = KERNELS
    page.open()
    page.find("summary").click()
    page.set(**{field.replace("-", "_"): value})
    page.find("summary").click()  # closed again
    page.ask()
    page.wait(lambda: page.problem(field) == problem)
    assert page.focused == field and page.find(f"#{field}").is_displayed()
    described = str(page.find(f"#{field}").get_attribute("aria-describedby"))
    assert f"{field}-problem" in described.split()
    assert page.server.questions == []
    page.find(f"#{field}").send_keys(webdriver.Keys.BACKSPACE * 6)
    page.wait(lambda: not page.problem(field))
    page.find("#question").send_keys(webdriver.Keys.ENTER)
    page.wait(lambda: len(page.server.questions) == 1)


def test_no_question(page: Page) -> None:
    page.find("#question").send_keys("   ")
    page.find("#ask").click()
    page.wait(lambda: page.problem("question") == "Write a question first.")
    assert page.focused == "question" and page.server.questions == []


def test_a_temperature_between_two_steps_is_fine(page: Page) -> None:
    page.find("summary").click()
    page.set(temperature="0.33")
    page.ask_and_wait()
    assert page.server.questions[0]["temperature"] == 0.33


@pytest.mark.parametrize(
    ("status", "message", "field", "problem"),
    [
        (400, "image 0: truncated or damaged", "image", "The server cannot use wide.png: truncated or damaged"),
        (
            413,
            "image 'data:image/png;…': 9 bytes, expected at most 8",
            "image",
            "wide.png is too large for this server:",
        ),
        (400, "route=[5]: expected a list of 3 experts", "route", "The server refuses this value: expected a list"),
        (400, "router_bias=2.0: this model has no routers", "bias", "The server refuses this value: this model"),
        (400, "max_tokens=9: too many", "max-tokens", "The server refuses this value: too many"),
        (400, "prompt has 900 rows: expected at most 500", "question", "The server refuses this value: has 900 rows"),
        (401, "the API key is missing or wrong", "key", "This server asks for an API key."),
    ],
)
def test_what_the_server_says_of_a_field_stands_beside_it(
    page: Page, wide_image: Path, status: int, message: str, field: str, problem: str
) -> None:
    body = json.dumps({"error": {"message": message}}).encode()
    page.server.answer = lambda reply: reply.error(status, body)
    page.choose(wide_image)
    page.ask_and_wait()
    assert page.problem(field).startswith(problem)
    assert not page.find("#error").is_displayed()
    assert page.focused == ("file" if field == "image" else field)
    page.server.answer = lambda reply: reply.done()
    page.set(question="Again?")
    if field == "image":
        page.find("#remove").click()
    page.find("#question").send_keys(webdriver.Keys.ENTER)
    page.wait(lambda: page.text("#status") == "Done.")
    assert not page.problem(field)


@pytest.mark.parametrize(("status", "words"), [(429, "too much to do"), (503, "shutting down")])
def test_a_server_that_cannot_answer_now(page: Page, status: int, words: str) -> None:
    page.server.answer = lambda reply: reply.error(status, b'{"error": {"message": "in other words"}}')
    page.ask_and_wait()
    assert words in page.text("#error")


def test_what_has_no_effect_is_not_offered(page: Page) -> None:
    page.find("summary").click()
    assert page.find("#bias").is_displayed()
    page.server.card["pooling_kernels"] = []
    page.open()
    page.find("summary").click()
    assert not page.find("#bias").is_displayed() and not page.find("#route").is_displayed()
    assert page.find("#temperature").is_displayed()


def test_kernels_of_the_model_are_named(page: Page) -> None:
    page.server.card["pooling_kernels"] = KERNELS[:1] * 3
    page.open()
    page.find("summary").click()
    assert "0 is 1x1, 1 is 1x2, 2 is 2x2, at each of 3 boundaries" in page.text("#route-hint")
    page.server.card["pooling_kernels"] = KERNELS
    page.open()
    page.find("summary").click()
    assert "1 is 2x2 at boundary 1" in page.text("#route-hint")


def test_the_model_is_called_one(page: Page) -> None:
    assert page.text("header") == "dpn_rt\nserves the model stub-model"


EXAMPLES = Path(__file__).parents[3] / "examples" / "images"


@pytest.mark.parametrize(("number", "name"), [(1, "scene_1.png"), (2, "scene_1.png"), (3, "scene_2.png")])
def test_an_example_asks_by_one_click(page: Page, number: int, name: str) -> None:
    page.server.answer = answer_with_pyramid
    button = page.find(f"#example-{number}")
    question = button.text
    button.click()
    page.wait(lambda: page.text("#status") == "Done.")
    image, text = content_of(page)
    assert text == {"type": "text", "text": question}
    assert image["image_url"]["url"] == url_of(EXAMPLES / name)
    assert page.find("#question").get_attribute("value") == question and page.text("#file-name") == name
    assert not page.find("#examples").is_displayed() and page.find("#pyramid").is_displayed()


@pytest.mark.parametrize(("width", "scrolls"), [(400, True), (1400, False)])
def test_the_answer_is_in_sight(page: Page, wide_image: Path, width: int, scrolls: bool) -> None:
    page.emulate(width, prefers_reduced_motion="reduce")
    page.choose(wide_image)
    page.server.answer = answer_with_pyramid
    page.ask_and_wait()
    top = page.run("return document.getElementById('answer-title').getBoundingClientRect().top")
    assert 0 <= top < 300
    assert (page.run("return scrollY") > 0) == scrolls
