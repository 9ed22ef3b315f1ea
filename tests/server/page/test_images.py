"""The image of a question, and the pyramid drawn over it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from tests.server.page.browser import Page
from tests.server.page.stub_server import (
    PYRAMID,
    answer_with_pyramid,
)

RED, BLUE, PADDING = (255, 0, 0), (0, 0, 255), (122, 116, 104)


def test_image_is_dropped_pasted_and_removed(page: Page, wide_image: Path) -> None:
    transfer = """
        const [target, kind, name, text] = arguments;
        const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], name, { type: "image/png" }));
        const options = { bubbles: true, cancelable: true };
        const event = kind === "drop"
            ? new DragEvent("drop", { ...options, dataTransfer: data })
            : new ClipboardEvent("paste", { ...options, clipboardData: data });
        target.dispatchEvent(event);
    """
    picture = base64.b64encode(wide_image.read_bytes()).decode()
    page.run(transfer, page.find("#drop"), "drop", "dropped.png", picture)
    page.wait(lambda: page.text("#file-name") == "dropped.png")
    page.run(transfer, page.find("#question"), "paste", "pasted.png", picture)
    page.wait(lambda: page.text("#file-name") == "pasted.png")
    page.run(transfer, page.find("#drop"), "drop", "broken.png", base64.b64encode(b"no image").decode())
    page.wait(lambda: "broken.png is not an image" in page.problem("image"))
    assert not page.find("#preview").is_displayed()
    page.choose(wide_image)
    page.find("#remove").click()
    page.wait(lambda: not page.find("#preview").is_displayed())
    page.ask_and_wait()
    assert page.server.questions[0]["messages"][0]["content"] == "What is it?"


def test_pyramid_is_drawn(page: Page, wide_image: Path) -> None:
    page.server.answer = answer_with_pyramid
    page.choose(wide_image)
    page.ask_and_wait()
    assert page.texts("figcaption") == [
        "stage 0: 35 visual tokens",
        "stage 1: 15 visual tokens, kernel 1x2\nthe router chose this with 75 %",
        "stage 2: 15 visual tokens, kernel skipped",
        "stage 3: 2 visual tokens, kernel 2x2",
    ]
    drawings = page.run("""return [...document.querySelectorAll("figure svg")].map((drawing) => ({
        hasDropped: drawing.querySelector(".dropped") !== null,
        rectangles: [...drawing.querySelectorAll("rect")].map((rect) =>
            ["y", "height", "x", "width"].map((name) => rect[name].baseVal.value / drawing.viewBox.baseVal.width)),
    }))""")
    assert [drawing["hasDropped"] for drawing in drawings] == [False, True, True, True]
    for stage, (height, width) in enumerate(
        [(1, 1), (1, 2), (1, 2), (2, 4)]
    ):  # in patches of the tower, which has 5 x 7
        rows, columns = PYRAMID["grids"][stage]
        expected = [
            [row * height / 5, height / 5, column * width / 7, width / 7]
            for row in range(rows)
            for column in range(columns)
        ]
        assert drawings[stage]["rectangles"] == [pytest.approx(item, abs=1e-5) for item in expected], f"stage {stage}"
    figures = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert figures == {
        "Time to first token": "170 ms",
        "Total time": "1.23 s",
        "Prefill FLOPs saved": "60.5 %",
        "Pooling kernels": "1x2, skipped, 2x2",
    }


@pytest.mark.parametrize(
    ("fit", "top", "left", "right"),
    [("pad", PADDING, RED, BLUE), (None, PADDING, RED, BLUE), ("crop", RED, RED, BLUE), ("stretch", RED, RED, BLUE)],
)
def test_image_is_shown_as_the_tower_saw_it(
    page: Page, wide_image: Path, fit: str | None, top: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    page.server.answer = lambda reply: answer_with_pyramid(reply, image_fit=fit)
    page.choose(wide_image)
    page.ask_and_wait()
    url = page.find("figure image").get_attribute("href")
    seen = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    side = seen.width
    assert seen.size == (side, side)
    for place, colour in {(0.1, 0.1): top, (0.4, 0.5): left, (0.6, 0.5): right}.items():
        pixel = seen.getpixel((round(place[0] * side), round(place[1] * side)))
        assert isinstance(pixel, tuple)
        assert max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 12, (place, pixel, colour)


def test_a_forced_kernel_is_told_from_a_chosen_one(page: Page, wide_image: Path) -> None:
    probs = [[0.25, 0.75, 0.0], None, [0.2, 0.6, 0.2]]
    page.server.answer = lambda reply: answer_with_pyramid(reply, experts=[1, 0, 2], probs=probs)
    page.choose(wide_image)
    page.find("summary").click()
    page.set(route=",0,2")
    page.ask_and_wait()
    details = [caption.partition("\n")[2] for caption in page.texts("figcaption")]
    assert details == [
        "", "the router chose this with 75 %", "forced", "forced (the router would have given it 20 %)",
    ]  # fmt: skip


def test_averages_show_what_is_left(page: Page, wide_image: Path) -> None:
    page.server.answer = lambda reply: answer_with_pyramid(
        reply, image_grid=[4, 4], patches_per_token=[[1, 1], [1, 2], [2, 4], [4, 4]]
    )
    page.choose(wide_image)
    page.ask_and_wait()
    seen = """return [...document.querySelectorAll("figure svg")].map(
        (drawing) => [...drawing.querySelectorAll("rect")].map((rect) => getComputedStyle(rect).fill))"""
    assert {fill for stage in page.run(seen) for fill in stage} == {"none"}
    page.find("#averages").click()
    assert page.find("#averages").get_attribute("aria-pressed") == "true"
    half_padding = [(colour + pad) // 2 for colour, pad in zip((127, 0, 127), PADDING, strict=True)]
    expected = [
        [PADDING] * 4 + [RED, RED, BLUE, BLUE] * 2 + [PADDING] * 4,  # the picture fills the middle half
        [PADDING] * 2 + [RED, BLUE] * 2 + [PADDING] * 2,
        [tuple(half_padding)] * 2,
        [tuple(half_padding)],
    ]
    for fills, colours in zip(page.run(seen), expected, strict=True):
        for fill, colour in zip(fills, colours, strict=True):
            channels = [int(part) for part in fill.removeprefix("rgb(").removesuffix(")").split(",")]
            assert max(abs(a - b) for a, b in zip(channels, colour, strict=True)) < 4, (fill, colour)
    page.find("#averages").click()
    assert {fill for stage in page.run(seen) for fill in stage} == {"none"}


def test_lines_are_thinner_where_there_are_many(page: Page, wide_image: Path) -> None:
    page.server.answer = lambda reply: answer_with_pyramid(
        reply, image_grid=[24, 24], patches_per_token=[[1, 1], [2, 1], [2, 2], [8, 8]]
    )
    page.choose(wide_image)
    page.ask_and_wait()
    widths = page.run("""return [...document.querySelectorAll("figure svg")].map(
        (drawing) => parseFloat(getComputedStyle(drawing.querySelector("rect")).strokeWidth))""")
    assert widths == sorted(widths)
    assert widths[0] < 0.5 and widths[-1] == 1
