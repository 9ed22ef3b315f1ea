"""Training-free reductions on the page: chosen with their amounts, drawn cell by cell, and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.support.ui import Select

from tests.server.page.browser import Page
from tests.server.page.stub_server import TIMINGS, Reply, answer_with_pyramid, begin_and_wait

FASTV, DROPS = "fastv:k=2,ratio=0.5", "pyramiddrop:layers=2-4,ratios=0.5-0.25"
POOL = "pool:kernel=2x2,layer=0,function=avg"
CHAIN = f"{POOL}+fastv:k=3,ratio=0.25"
RANDOM = "random:layer=2,keep=0.5,seed=0,positions=keep"
SPECS = [FASTV, DROPS, CHAIN, RANDOM, POOL, "divprune:keep=0.1", "none", "fastv:k=2,ratio=0.75"]
SHAPES = [
    *("fastv, k 2", "pyramiddrop, layers 2-4", "pool, layer 0, function avg + fastv, k 3"),
    *("random, layer 2, seed 0, positions keep", "pool, layer 0, function avg", "divprune", "none"),
]
NOTHING: dict[str, Any] = {"experts": [None, None], "kernels": [None, None], "probs": [None, None]}


@pytest.fixture
def reducing(page: Page) -> Page:
    """The page of a server with reductions, which answers as it is asked."""
    page.server.card["reductions"] = SPECS
    page.server.answer = answer_as_asked
    page.open()
    return page


def answer_as_asked(reply: Reply) -> None:
    """Names the reduction, and keeps every other cell of two rows and four columns where there is one."""
    spec = asked = reply.question["reduce"]
    if not reply.question["stream"]:
        reply.error(200, b"{}")
        return
    kept = [] if asked == "none" else [[0, 2, 5, 7]]
    pyramid = NOTHING | {
        "visual_tokens": [8, 4, 4] if kept else [8, 8, 8],
        "image_grid": [2, 4],
        "patches_per_token": [[1, 1]] * 3,
        "kept": kept,
        "steps": [{"stage": 1, "spec": spec}] * len(kept),
        "reduction": spec,
        "flops": {"prefill": 600, "dense_prefill": 1000, "saved": 0.4 if kept else 0.0},
    }
    answer_with_pyramid(reply, f"By {asked}.", **pyramid)


def choose(page: Page, shape: str, side: str = "") -> None:
    Select(page.find(f"#reduction{side}")).select_by_visible_text(shape)


def asked(page: Page) -> list[str]:
    return [question["reduce"] for question in page.server.questions if question["stream"]]


def test_a_server_without_reductions_offers_none(page: Page, wide_image: Path) -> None:
    for reductions in ([], None):
        page.server.card["reductions"] = reductions
        page.open()
        page.server.answer = answer_with_pyramid
        page.choose(wide_image)
        page.ask_and_wait()
        assert not page.find("#reductions").is_displayed() and "reduce" not in page.server.questions[-1]
        assert not page.find("#asked").is_displayed() and not page.find("#drawn").is_displayed()
        assert page.texts("figcaption")[1].startswith("stage 1: 15 visual tokens, kernel 1x2")


def test_the_visitor_chooses_reduction_and_amount(reducing: Page) -> None:
    """The default first; two reductions that differ in amounts alone are one choice."""
    page = reducing
    select = Select(page.find("#reduction"))
    assert [option.text for option in select.options] == SHAPES
    assert select.first_selected_option.text == SHAPES[0]
    for shape, label, shown, given, spec in (
        (SHAPES[0], "Share dropped", "0.5", "0.75", "fastv:k=2,ratio=0.75"),
        (SHAPES[1], "Shares kept", "0.5-0.25", "1-.5", "pyramiddrop:layers=2-4,ratios=1-.5"),
        (SHAPES[2], "Kernel + share dropped", "2x2 + 0.25", "1x3+0", CHAIN.replace("2x2", "1x3").replace("0.25", "0")),
        (SHAPES[3], "Share kept", "0.5", " 0.1 ", RANDOM.replace("0.5", "0.1")),
        (SHAPES[4], "Kernel", "2x2", "4x1", POOL.replace("2x2", "4x1")),
    ):
        choose(page, shape)
        assert page.text("#amount-label") == label
        assert page.find("#amount").get_attribute("value") == shown
        page.set(amount=given, question="")
        page.ask_and_wait()
        assert asked(page)[-1] == spec
        assert page.find("#amount").get_attribute("value") == given, "asking leaves what was typed"
        assert page.text("#asked") == spec
    choose(page, "none")
    assert not page.find("#amount").is_displayed()
    page.set(question="")
    page.ask_and_wait()
    assert asked(page)[-1] == "none"


CANNOT_BE_SENT = [
    (SHAPES[0], "1.5", '"1.5" is no share, expected a number from 0 to 1.'),
    (SHAPES[0], "-0.5", '"-0.5" is no share, expected a number from 0 to 1.'),
    (SHAPES[0], "half", '"half" is no share, expected a number from 0 to 1.'),
    (SHAPES[0], "1e-1", '"1e-1" is no share, expected a number from 0 to 1.'),
    (SHAPES[0], "", "Nothing is no share, expected a number from 0 to 1."),
    (SHAPES[0], "0.5 + 0.5", "Expected one value, something like 0.5."),
    (SHAPES[1], "0.5", "These are 1 shares, expected 2, something like 0.5-0.25."),
    (SHAPES[1], "0.25-0.5", "Expected no share above the one before: what was dropped does not come back."),
    (SHAPES[1], "0.5-2", '"2" is no share, expected a number from 0 to 1.'),
    (SHAPES[2], "2x2", "Expected 2 values, something like 2x2 + 0.25."),
    (SHAPES[2], "0x2 + 0.5", '"0x2" is no kernel, expected height and width such as 2x2.'),
    (SHAPES[4], "2", '"2" is no kernel, expected height and width such as 2x2.'),
    (SHAPES[4], "2x1025", '"2x1025" is no kernel, expected height and width such as 2x2.'),
]


@pytest.mark.parametrize("side", ["", "-2"])
def test_an_amount_that_cannot_be_sent(reducing: Page, side: str) -> None:
    page = reducing
    page.find("#compare").click()
    page.find("#question").send_keys("What is it?")
    for shape, given, problem in CANNOT_BE_SENT:
        choose(page, shape, side)
        page.find(f"#amount{side}").clear()
        page.find(f"#amount{side}").send_keys(given)
        page.find("#question").send_keys("\n")
        page.wait(lambda problem=problem: page.problem(f"amount{side}") == problem)
        assert page.focused == f"amount{side}" and page.server.questions == []
    if side:  # a reduction that is not asked for is not checked
        page.find("#compare").click()
        assert not page.find("#second").is_displayed()
    else:
        choose(page, "none")
    assert not page.problem(f"amount{side}")
    page.find("#question").send_keys("\n")
    page.wait(lambda: page.text("#status") == "Done.")


@pytest.mark.parametrize("side", ["", "-2"])
def test_what_the_server_says_of_a_reduction_stands_beside_it(reducing: Page, side: str) -> None:
    page = reducing

    def refuse(reply: Reply) -> None:
        if reply.question["reduce"] == RANDOM:
            message = f"reduce='{RANDOM}': the engine has no boundary before layer 2"
            reply.error(400, json.dumps({"error": {"message": message}}).encode())
        else:
            answer_as_asked(reply)

    page.server.answer = refuse
    page.find("#compare").click()
    choose(page, SHAPES[3], side)
    page.ask_and_wait()
    assert page.problem(f"amount{side}") == "The server refuses this value: the engine has no boundary before layer 2"
    assert page.focused == f"amount{side}" and not page.find("#error").is_displayed()
    assert not page.problem(f"amount{'' if side else '-2'}")


def test_a_refused_reduction_without_amount_is_an_error_of_the_answer(reducing: Page) -> None:
    page = reducing
    message = "reduce='none': not now"
    page.server.answer = lambda reply: reply.error(400, json.dumps({"error": {"message": message}}).encode())
    choose(page, "none")
    page.ask_and_wait()
    assert page.text("#error") == message


def drawn_cells(page: Page, stages: str) -> list[list[list[float]]]:
    """Row and column, in cells of two rows and four columns, of each rectangle of each stage."""
    return list(
        page.run(
            """return [...document.querySelectorAll(`#${arguments[0]} svg`)].map((drawing) => {
        const side = drawing.viewBox.baseVal.width;
        return [...drawing.querySelectorAll("rect")].map(
            ({ x, y }) => [Math.round((2 * y.baseVal.value) / side), Math.round((4 * x.baseVal.value) / side)]);
    })""",
            stages,
        )
    )


WHOLE = [[row, column] for row in range(2) for column in range(4)]
KEPT = [[0, 0], [0, 2], [1, 1], [1, 3]]


def test_kept_cells_are_drawn_and_dropped_ones_dimmed(reducing: Page, wide_image: Path) -> None:
    page = reducing
    page.choose(wide_image)
    page.ask_and_wait()
    assert drawn_cells(page, "stages") == [WHOLE, KEPT, KEPT]
    assert page.texts("figcaption") == [
        *("stage 0: 8 visual tokens", "stage 1, fastv: 4 visual tokens", "stage 2: 4 visual tokens"),
    ]
    dims = """return [...document.querySelectorAll("#stages svg")].map((drawing) => {
        const dropped = drawing.querySelector(".dropped");
        if (!dropped) return null;
        const side = drawing.viewBox.baseVal.width;
        const found = [];
        for (let cell = 0; cell < 8; cell++) {
            const place = new DOMPoint(((cell % 4) + 0.5) * side / 4, (Math.floor(cell / 4) + 0.5) * side / 2);
            if (dropped.isPointInFill(place)) found.push(cell);
        }
        return found;
    })"""
    assert page.run(dims) == [None, [1, 3, 4, 6], [1, 3, 4, 6]]
    assert page.find("#dropped").is_displayed()
    labels = [item.get_attribute("aria-label") for item in page.driver.find_elements("css selector", "#stages svg")]
    assert labels[0] == "The image under 2 rows and 4 columns of rectangles"
    assert labels[1].endswith("rectangles, of which 4 are kept")
    figures = dict(zip(page.texts("#figures dt"), page.texts("#figures dd"), strict=True))
    assert figures["Visual tokens"] == "8, 4, 4" and figures["Prefill FLOPs saved"] == "40.0 %"


@pytest.mark.parametrize(
    ("spec", "fields", "cells"),
    [
        (  # pooled before the decoder, then ranked
            CHAIN,
            {"kept": [None, [1]], "steps": [(0, POOL), (2, FASTV)], "patches_per_token": [[1, 2]] * 3},
            [[[0, 0], [0, 2], [1, 0], [1, 2]]] * 2 + [[[0, 2]]],
        ),
        (  # two boundaries of one method, and one of another request's between them
            DROPS,
            {"kept": [[0, 7], [7]], "steps": [(0, DROPS), (2, DROPS)], "patches_per_token": [[1, 1]] * 3},
            [[[0, 0], [1, 3]]] * 2 + [[[1, 3]]],
        ),
        (
            "fastv:k=2,ratio=1",
            {"kept": [[]], "steps": [(1, FASTV)], "patches_per_token": [[1, 1]] * 3},
            [WHOLE, [], []],
        ),
    ],
)
def test_chains_and_ranks_are_drawn(
    reducing: Page, wide_image: Path, spec: str, fields: dict[str, Any], cells: list[Any]
) -> None:
    steps = [{"stage": stage, "spec": each} for stage, each in fields["steps"]]
    counts = [len(each) for each in cells]
    pyramid = NOTHING | fields | {"image_grid": [2, 4], "steps": steps, "visual_tokens": counts, "reduction": spec}
    reducing.server.answer = lambda reply: answer_with_pyramid(reply, **pyramid)
    reducing.choose(wide_image)
    reducing.ask_and_wait()
    assert drawn_cells(reducing, "stages") == cells


@pytest.mark.parametrize(("width", "is_beside"), [(1280, True), (700, True), (390, False), (320, False)])
def test_two_reductions_are_compared(reducing: Page, wide_image: Path, width: int, is_beside: bool) -> None:
    """The same question, first unseen so that neither has to wait for the picture; on a phone one below the other."""
    page = reducing
    page.emulate(width, prefers_reduced_motion="reduce")
    page.choose(wide_image)
    page.find("#compare").click()
    assert Select(page.find("#reduction-2")).first_selected_option.text == "none"
    page.ask_and_wait("Which?")
    questions = page.server.questions
    assert [(each["reduce"], each["stream"]) for each in questions] == [
        *((FASTV, False), ("none", False), (FASTV, True), ("none", True)),
    ]
    assert len({json.dumps(each["messages"]) for each in questions}) == 1
    assert [each["max_tokens"] for each in questions] == [1, 1, 128, 128]
    assert (page.text("#asked"), page.text("#asked-2")) == (FASTV, "none")
    assert (page.text("#answer"), page.text("#answer-2")) == (f"By {FASTV}.", "By none.")
    for side, saved in (("", "40.0 %"), ("-2", "0.0 %")):
        shown = dict(zip(page.texts(f"#figures{side} dt"), page.texts(f"#figures{side} dd"), strict=True))
        assert (shown["Time to first token"], shown["Total time"]) == ("170 ms", "1.23 s")
        assert shown["Prefill FLOPs saved"] == saved
    assert page.text("#status") == "Done." and page.find("#fair").is_displayed()
    assert drawn_cells(page, "stages") == [WHOLE, KEPT, KEPT] and drawn_cells(page, "stages-2") == [WHOLE] * 3
    for first, second in (("answer", "answer-2"), ("stages", "stages-2")):
        boxes = page.run(
            "return [...arguments].map((id) => document.getElementById(id).getBoundingClientRect().toJSON())",
            first,
            second,
        )
        assert (boxes[0]["right"] < boxes[1]["left"]) == is_beside
        assert (boxes[0]["bottom"] <= boxes[1]["top"]) != is_beside
    assert page.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    tops = """return [...document.querySelectorAll(`#${arguments[0]} svg`)].map(
        (drawing) => Math.round(drawing.getBoundingClientRect().top))"""
    assert (page.run(tops, "stages") == page.run(tops, "stages-2")) == is_beside, "stages stand beside each other"
    page.find("#compare").click()
    page.ask_and_wait()
    assert len(asked(page)) == 3 and not page.find("#second-reply").is_displayed()
    assert not page.find("#second-drawing").is_displayed() and not page.find("#fair").is_displayed()


def test_text_alone_is_compared_too(reducing: Page) -> None:
    def answer(reply: Reply) -> None:
        if not reply.question["stream"]:
            reply.error(200, b"{}")
            return
        reply.text(str(reply.question["reduce"]), "stop")
        reply.event({"choices": [], "pyramid": None, "timings": TIMINGS})
        reply.done()

    reducing.server.answer = answer
    reducing.find("#compare").click()
    reducing.ask_and_wait()
    assert (reducing.text("#answer"), reducing.text("#answer-2")) == (FASTV, "none")
    assert not reducing.find("#pyramid").is_displayed()


def test_what_came_before_the_second_answer_failed_stays(reducing: Page, wide_image: Path) -> None:
    def answer(reply: Reply) -> None:
        if reply.question["reduce"] == "none" and reply.question["stream"]:
            reply.error(500, b"")
        else:
            answer_as_asked(reply)

    reducing.server.answer = answer
    reducing.choose(wide_image)
    reducing.find("#compare").click()
    reducing.ask_and_wait()
    assert reducing.text("#error") and reducing.text("#answer") == f"By {FASTV}."
    assert drawn_cells(reducing, "stages") == [WHOLE, KEPT, KEPT] and drawn_cells(reducing, "stages-2") == []


def test_a_comparison_is_stopped(reducing: Page) -> None:
    def answer(reply: Reply) -> None:
        begin_and_wait(reply) if reply.question["stream"] else reply.error(200, b"{}")

    reducing.server.answer = answer
    reducing.find("#compare").click()
    reducing.ask()
    reducing.wait(lambda: reducing.text("#answer") == "The beginning")
    reducing.find("#stop").click()
    reducing.wait_for_end()
    assert reducing.text("#status") == "Stopped." and len(asked(reducing)) == 1


def test_the_controls_are_reached_by_keyboard_and_have_names(reducing: Page) -> None:
    reducing.find("#compare").click()
    choose(reducing, SHAPES[1], "-2")
    reducing.find("header").click()
    names = {}
    for field in ("reduction", "amount", "compare", "reduction-2", "amount-2"):
        reducing.tab_to(field)
        names[field] = reducing.driver.switch_to.active_element.accessible_name
    assert names == {
        "reduction": "Reduction",
        "amount": "Share dropped",
        "compare": "Compare with another reduction",
        "reduction-2": "Second reduction",
        "amount-2": "Shares kept",
    }
