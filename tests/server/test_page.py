"""The page at `/` in a browser, against a stub of the API."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import select
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

webdriver = pytest.importorskip("selenium.webdriver", reason="the page is tested through selenium")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver")

PAGE = Path(__file__).parents[2] / "dpn_rt" / "server" / "page.html"
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)
WITHOUT_POLICY = "/without-policy"
"""Where the page comes without the header, so that what it says of itself is all that holds."""
PATIENCE = 30.0
"""Seconds after which something that should happen is taken not to."""

PYRAMID: dict[str, Any] = {
    "experts": [1, None, 2],
    "kernels": [[1, 2], None, [2, 2]],
    "probs": [[0.25, 0.75, 0.0], None, None],
    "visual_tokens": [35, 15, 15, 2],
    "kv_lengths": [55, 35, 35, 22],
    "grids": [[5, 7], [5, 3], [5, 3], [2, 1]],
    "image_fit": "pad",
    "flops": {"prefill": 395, "dense_prefill": 1000, "saved": 0.605},
}
TIMINGS = {"queue": 0.0, "first_token": 0.17, "total": 1.234}
HTML_MESSAGE = "bad <img src=x onerror=\"document.title='run'\"> <b>value</b>"
RED, BLUE, PADDING = (255, 0, 0), (0, 0, 255), (122, 116, 104)


class StubServer(ThreadingHTTPServer):
    """Serves the page and plays the API: `answer` writes the reply to a question.

    `questions` holds the bodies of the questions, `keys` their Authorization headers, `paths` every path asked for.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Callable[[Reply], None] = Reply.nothing
        self.questions: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.client_left = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser closes connections as it likes."""


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path in ("/", WITHOUT_POLICY):
            policy = {"Content-Security-Policy": POLICY} if self.path == "/" else {}
            self._reply(PAGE.read_bytes(), "text/html; charset=utf-8", policy)
        elif self.path == "/v1/models":
            card = {"object": "list", "data": [{"id": "stub-model"}]}
            self._reply(json.dumps(card).encode(), "application/json", {})
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        self.server.questions.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        self.server.answer(Reply(self))

    def _reply(self, body: bytes, content_type: str, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Reply:
    """What a test writes as the answer to one question."""

    def __init__(self, handler: _Handler) -> None:
        self._handler = handler
        self._has_begun = False

    def nothing(self) -> None:
        """Only the end of a stream."""
        self.done()

    def error(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", content_type)
        self._handler.end_headers()
        self._handler.wfile.write(body)

    def text(self, content: str, finish_reason: str | None = None) -> None:
        self.event({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}]})

    def event(self, data: dict[str, Any]) -> None:
        self.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())

    def done(self) -> None:
        self.write(b"data: [DONE]\n\n")

    def write(self, part: bytes) -> None:
        """Goes out at once."""
        if not self._has_begun:
            self._has_begun = True
            self._handler.send_response(200)
            self._handler.send_header("Content-Type", "text/event-stream")
            self._handler.end_headers()
        self._handler.wfile.write(part)
        self._handler.wfile.flush()

    def wait_until_client_leaves(self) -> None:
        """Sets `client_left` of the server when the browser closes the connection."""
        connection = self._handler.connection
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if select.select([connection], [], [], 0.1)[0] and not connection.recv(1):
                self._handler.server.client_left.set()
                return


@contextmanager
def serving() -> Iterator[StubServer]:
    server = StubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
        """What `script`, the body of an async function, returns."""
        wrapped = f"const done = arguments[arguments.length - 1]; (async () => {{ {script} }})().then(done, done)"
        return self.driver.execute_async_script(wrapped, *args)

    def type(self, *keys: str) -> None:
        """Into whatever has the focus."""
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


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
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


def begin_and_wait(reply: Reply) -> None:
    reply.text("The beginning")
    reply.wait_until_client_leaves()


def answer_with_pyramid(reply: Reply, text: str = "A cat.", **fields: Any) -> None:
    reply.text(text, "stop")
    reply.event({"choices": [], "pyramid": {**PYRAMID, **fields}, "timings": TIMINGS})
    reply.done()


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
    page.wait(lambda: "broken.png is not an image" in page.text("#error"))
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
        "stage 1: 15 visual tokens, kernel 1x2\nrouter: 75 %",
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
        "Route": "1x2, skipped, 2x2 (experts 1, none, 2)",
    }


@pytest.mark.parametrize(
    ("fit", "top", "left", "right"),
    [("pad", PADDING, RED, BLUE), (None, PADDING, RED, BLUE), ("crop", RED, RED, BLUE)],
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
    page.find("#ask").click()  # without effect while an answer comes
    page.find("#stop").click()
    assert page.server.client_left.wait(PATIENCE)
    page.wait_for_end()
    assert (page.text("#answer"), page.text("#status")) == ("The beginning", "Stopped.")
    assert not page.find("#error").is_displayed()
    assert not page.find("#stop").is_displayed()
    assert len(page.server.questions) == 1


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
    for _ in range(12):
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
    """Of all text that is seen, placeholders included, to the nearest background behind it."""
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
    source = PAGE.read_text("utf-8")
    assert re.findall(r"https?://[^\"'\s]+", source) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", source)
