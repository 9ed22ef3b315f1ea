"""A stub of the API, and the page in front of it."""

from __future__ import annotations

import json
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dpn_rt.server.page.document import page_text

POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)
WITHOUT_POLICY = "/without-policy"
"""Path of the page without the header, so that only the policy in the page itself applies."""
PATIENCE = 30.0
PYRAMID: dict[str, Any] = {
    "experts": [1, None, 2],
    "kernels": [[1, 2], None, [2, 2]],
    "probs": [[0.25, 0.75, 0.0], None, None],
    "visual_tokens": [35, 15, 15, 2],
    "kv_lengths": [55, 35, 35, 22],
    "grids": [[5, 7], [5, 3], [5, 3], [2, 1]],
    "image_grid": [5, 7],
    "patches_per_token": [[1, 1], [1, 2], [1, 2], [2, 4]],
    "kept": [None, None, None],
    "steps": [],
    "reduction": None,
    "image_fit": "pad",
    "flops": {"prefill": 395, "dense_prefill": 1000, "saved": 0.605},
}
TIMINGS = {"queue": 0.0, "first_token": 0.17, "total": 1.234}


class StubServer(ThreadingHTTPServer):
    """Serves the page and a fake API: `answer` writes the reply to a question.

    `questions` holds the bodies of the questions, `keys` their Authorization headers, `paths` every path asked for.
    `card` is the model's; it is given while `may_list_models` is set.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Callable[[Reply], None] = Reply.nothing
        self.questions: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.client_left = threading.Event()
        self.card: dict[str, Any] = {"id": "stub-model"}
        self.may_list_models = threading.Event()
        self.may_list_models.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores errors of connections, which a browser may close at any time."""


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path in ("/", WITHOUT_POLICY):
            policy = {"Content-Security-Policy": POLICY} if self.path == "/" else {}
            self._reply(page_text().encode(), "text/html; charset=utf-8", policy)
        elif self.path == "/v1/models":
            self.server.may_list_models.wait(PATIENCE)
            models = {"object": "list", "data": [self.server.card]}
            self._reply(json.dumps(models).encode(), "application/json", {})
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        self.question: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.questions.append(self.question)
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
    """The answer to one question, which a test writes."""

    def __init__(self, handler: _Handler) -> None:
        self._handler = handler
        self._has_begun = False

    @property
    def question(self) -> dict[str, Any]:
        """The body of the question."""
        return self._handler.question

    def nothing(self) -> None:
        """Writes only the end of a stream."""
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
        """Sends the text at once."""
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


def begin_and_wait(reply: Reply) -> None:
    reply.text("The beginning")
    reply.wait_until_client_leaves()


def answer_with_pyramid(reply: Reply, text: str = "A cat.", **fields: Any) -> None:
    reply.text(text, "stop")
    reply.event({"choices": [], "pyramid": {**PYRAMID, **fields}, "timings": TIMINGS})
    reply.done()
