"""The page by keyboard and by accessible names, on narrow and wide screens, in dark and light mode."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.server.page.browser import Page, webdriver
from tests.server.page.stub_server import (
    PATIENCE,
    answer_with_pyramid,
    begin_and_wait,
)


def test_keyboard_is_enough(page: Page) -> None:
    keys = webdriver.Keys
    page.tab_to("question")
    webdriver.ActionChains(page.driver).send_keys("One").key_down(keys.SHIFT).send_keys(keys.ENTER).key_up(
        keys.SHIFT
    ).send_keys("Two", keys.ENTER).perform()
    page.wait_for_end()
    assert page.server.questions[0]["messages"][0]["content"] == "One\nTwo"
    page.server.answer = begin_and_wait
    page.tab_to("ask")
    page.type(keys.ENTER)
    page.wait(lambda: page.text("#answer") == "The beginning")
    page.tab_to("stop")
    page.type(keys.SPACE)
    page.wait_for_end()
    assert page.server.client_left.wait(PATIENCE)
    assert page.focused == "question"


def test_focus_is_seen_and_controls_have_names(page: Page, wide_image: Path) -> None:
    page.choose(wide_image)
    page.tab_to("summary")
    page.type(webdriver.Keys.ENTER)
    page.find("header").click()  # from where the first tab leads into the form
    reached = {}
    for _ in range(20):
        page.type(webdriver.Keys.TAB)
        if page.focused == "body":
            break
        assert page.focused not in reached
        reached[page.focused] = page.driver.switch_to.active_element.accessible_name
        outline = page.run("""
            const element = document.activeElement.closest("label") ?? document.activeElement;
            const style = getComputedStyle(element);
            return style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth);
        """)
        assert outline >= 2, page.focused
    assert list(reached) == [
        "file", "remove", "question", "ask", "summary", "max-tokens", "temperature", "bias", "route", "key",
        "example-1", "example-2", "example-3", "example-4",
    ]  # fmt: skip
    assert all(reached.values()), reached


@pytest.mark.parametrize("width", [320, 760, 1400])
def test_nothing_is_wider_than_the_viewport(page: Page, tmp_path: Path, width: int) -> None:
    image = tmp_path / f"{'long' * 50}.png"
    Image.new("RGB", (3000, 100)).save(image)
    page.emulate(width)
    page.choose(image)
    page.find("summary").click()
    page.server.answer = lambda reply: answer_with_pyramid(reply, "long" * 200)
    page.ask_and_wait()
    assert page.find("#pyramid").is_displayed()
    assert page.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    right_edges = page.run("""return [...document.querySelectorAll("main *:not(svg *)")].map(
        (element) => [element.id || element.localName, element.getBoundingClientRect().right])""")
    assert [name for name, edge in right_edges if edge > width] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page: Page, wide_image: Path, scheme: str) -> None:
    page.emulate(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    ground = luminance(page.run("return getComputedStyle(document.body).backgroundColor"))
    assert (ground > 0.5) == (scheme == "light")
    page.find("summary").click()
    assert_contrast(page)  # with the invitation to choose an image
    page.choose(wide_image)
    page.server.answer = answer_with_pyramid
    page.ask_and_wait()
    assert_contrast(page)
    page.server.answer = begin_and_wait
    page.ask()
    page.wait(lambda: page.find("#stop").is_displayed())
    assert_contrast(page)
    page.find("#stop").click()
    page.wait_for_end()
    page.server.answer = lambda reply: reply.error(500, b"")
    page.ask_and_wait()
    assert page.text("#error")
    assert_contrast(page)


def assert_contrast(page: Page) -> None:
    """Checks the contrast of all visible text, placeholders included, with the nearest opaque background."""
    texts = page.run("""
        const found = [];
        for (const element of document.querySelectorAll("body, body *")) {
            const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
            const hasValue = element.matches("textarea, input:not([type=range], [type=file])");
            if (!(hasText || hasValue) || !element.checkVisibility()) continue;
            let behind = element;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            const background = getComputedStyle(behind).backgroundColor;
            for (const part of hasValue ? [null, "::placeholder"] : [null]) {
                found.push([element.id || element.localName, getComputedStyle(element, part).color, background]);
            }
        }
        return found;
    """)
    assert len(texts) > 15
    for name, colour, background in texts:
        low, high = sorted((luminance(colour), luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, colour, background)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it, of an opaque colour."""
    match = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour)
    assert match, colour
    channels = [int(value) / 255 for value in match.groups()]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("motion", "moves"), [("no-preference", True), ("reduce", False)])
def test_motion_is_left_out_on_demand(page: Page, motion: str, moves: bool) -> None:
    page.emulate(prefers_reduced_motion=motion)
    page.server.answer = begin_and_wait
    page.ask()
    page.wait(lambda: page.text("#answer") == "The beginning")
    assert bool(page.run("return document.getAnimations().length")) == moves
