"""The parts of a service, without a cluster."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpn_rt.ray_serve.image_key import image_key
from dpn_rt.ray_serve.ingress import Forwarder, application
from dpn_rt.ray_serve.messages import ForwardedRequest, respond
from dpn_rt.ray_serve.metrics import merged
from dpn_rt.ray_serve.proxy import layers
from dpn_rt.ray_serve.routing import ImageAffinityRouter, preferred
from dpn_rt.server.config import ServerConfig
from tests.ray_serve.conftest import HANG_SECONDS


def chat(*parts: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}], **fields}).encode()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_key_is_of_the_first_image_as_it_was_sent() -> None:
    first = image_key(chat(image("data:image/png;base64,AAAA"), {"type": "text", "text": "?"}))
    assert len(first) == 64
    assert first == image_key(chat({"type": "text", "text": "other"}, image("data:image/png;base64,AAAA"), stream=True))
    assert first == image_key(chat(image("data:image/png;base64,AAAA"), image("https://b")))
    assert first == image_key(chat({"type": "image_url", "image_url": "data:image/png;base64,AAAA"}))
    assert first != image_key(chat(image("data:image/png;base64,AAAB")))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no JSON",
        b"[1]",
        b'{"messages": 3, "image_url": 1}',
        b'{"messages": [3, {"content": [4, {"image_url": [5]}]}]}',
        b'{"messages": [{"content": "image_url"}]}',
        b'{"prompt": "\\"image_url\\""}',
        chat({"type": "text", "text": '"image_url"'}),
        b"\xff" + chat(image("https://a")),
    ],
)
def test_what_has_no_image_has_no_key(body: bytes) -> None:
    assert image_key(body) == ""


def test_a_replica_that_goes_moves_its_own_images_alone() -> None:
    replicas = {f"r{number}": number for number in range(5)}
    keys = [random.randbytes(8).hex() for _ in range(400)]
    before = {key: preferred(key, replicas) for key in keys}
    counts = np.bincount(list(before.values()), minlength=5)
    assert counts.min() > 400 / 5 / 2, counts
    gone = {name: number for name, number in replicas.items() if number != 2}
    after = {key: preferred(key, gone) for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != 2)
    assert len({after[key] for key in keys if before[key] == 2}) == 4


class Name(str):
    """Of a replica."""

    @property
    def unique_id(self) -> str:
        return str(self)


def router_of(loads: dict[str, int | None]) -> ImageAffinityRouter:
    """A router to whom replicas have reported these numbers of requests."""
    router = ImageAffinityRouter.__new__(ImageAffinityRouter)
    router.initialize_state(capacity=4)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda replica_id: loads[replica_id])
    router._use_replica_queue_len_cache = False
    return router


def routed(loads: dict[str, int | None], key: str, router: ImageAffinityRouter | None = None) -> list[list[str]]:
    """The ranks of replicas that a router offers."""
    router = router or router_of(loads)
    replicas = [SimpleNamespace(replica_id=Name(name)) for name in loads]
    pending = SimpleNamespace(
        metadata=SimpleNamespace(session_id=key), routing_context=SimpleNamespace(should_backoff=False)
    )
    ranks = asyncio.run(router.choose_replicas(replicas, pending))
    assert pending.routing_context.should_backoff
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


def test_a_known_image_goes_to_its_replica_while_that_has_a_place() -> None:
    loads: dict[str, int | None] = {"a": 3, "b": 0, "c": None}
    own = preferred("key", {name: name for name in loads})
    for load in (0, 3, None):
        assert routed({**loads, own: load}, "key")[0] == [own]
    ranks = routed({**loads, own: 4}, "key")
    assert len(ranks) == 1 and own not in ranks[0] and len(ranks[0]) == 2
    assert routed(dict.fromkeys(loads, 4), "key") == [[]]


def test_a_router_counts_what_it_has_sent_itself() -> None:
    """Replicas report late: what the first of a burst reports is that there is nothing else."""
    loads: dict[str, int | None] = {"a": 1, "b": 1}
    own = preferred("key", {name: name for name in loads})
    router = router_of(loads)
    for _ in range(4):
        assert routed(loads, "key", router)[0] == [own]
        router.on_send_request(Name(own))
    assert routed(loads, "key", router) == [["b" if own == "a" else "a"]]
    router.on_request_completed(Name(own), "")
    assert routed(loads, "key", router)[0] == [own]


def test_a_request_without_an_image_goes_to_one_of_two() -> None:
    found = {tuple(sorted(routed({"a": 0, "b": 0, "c": 0, "full": 4}, "")[0])) for _ in range(100)}
    assert found == {("a", "b"), ("a", "c"), ("b", "c")}


def test_metrics_of_replicas_stand_beside_each_other() -> None:
    text = '# HELP x:n_total Many.\n# TYPE x:n_total counter\nx:n_total{{m="t"}} {}\n# TYPE g gauge\ng 1.5\n'
    together = merged({"one": text.format(3), "two": text.format(4)}).decode()
    families = {family.name: family for family in text_string_to_metric_families(together)}
    samples = {(s.name, s.labels["replica"], s.labels.get("m")): s.value for f in families.values() for s in f.samples}
    assert samples == {
        ("x:n_total", "one", "t"): 3, ("x:n_total", "two", "t"): 4, ("g", "one", None): 1.5, ("g", "two", None): 1.5,
    }  # fmt: skip
    assert families["x:n"].type == "counter" and families["x:n"].documentation == "Many."
    assert together.count("# TYPE x:n_total counter") == 1
    assert merged({}) == b""


START = {"type": "http.response.start", "status": 200, "headers": []}


def body(content: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def request(content: bytes = b"", **scope: Any) -> ForwardedRequest:
    return ForwardedRequest({"type": "http", "method": "POST", "path": "/", "headers": [], **scope}, content)


async def _all(app: ASGIApp, asked: ForwardedRequest, taken: asyncio.Event | None = None) -> list[list[Message]]:
    """All parts of a reply; `taken` is set when the first is there."""
    parts = []
    async for ready in respond(app, asked):
        parts.append(ready)
        if taken is not None:
            taken.set()
    return parts


def test_a_reply_comes_in_parts_of_which_the_first_has_content() -> None:
    taken = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked = await receive()
        await send(START)
        for _ in range(10):  # the reader has its turns, and still waits for content
            await asyncio.sleep(0)
        assert not taken.is_set()
        await send(body(asked["body"], more=True))
        await taken.wait()
        await send(body(b"b", more=True))
        await send(body(b"c"))

    parts = asyncio.run(_all(app, request(b"a"), taken))
    assert parts == [[START, body(b"a", more=True)], [body(b"b", more=True), body(b"c")]]


def test_an_error_of_the_application_comes_through() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("of the application")

    with pytest.raises(ValueError, match="of the application"):
        asyncio.run(_all(app, request()))


def test_closing_a_reply_tells_the_application_that_the_client_left() -> None:
    seen: list[str] = []
    waits = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(START)
        await send(body(b"a", more=True))
        waits.set()
        seen.append((await receive())["type"])

    async def leave() -> None:
        parts = respond(app, request())
        await anext(parts)
        await waits.wait()
        await parts.aclose()

    asyncio.run(leave())
    assert seen == ["http.disconnect"]


Answer = Callable[[ForwardedRequest], AsyncIterator[list[Message]]]


class Handle:
    """A stand-in for the handle of the replicas: each call is answered by the next of `answers`."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.keys, self.asked, self.cancelled = list(answers), [], [], 0

    def options(self, *, method_name: str, stream: bool, session_id: str) -> Handle:
        assert method_name == "respond" and stream
        self.keys.append(session_id)
        return self

    def remote(self, asked: ForwardedRequest) -> Any:
        self.asked.append(asked)
        parts = self.answers.pop(0)(asked)
        handle = self

        class Parts:
            def __aiter__(self) -> AsyncIterator[list[Message]]:
                return parts

            def cancel(self) -> None:
                handle.cancelled += 1

        return Parts()


def whole(content: bytes = b"{}", media_type: bytes = b"application/json") -> Answer:
    async def answer(asked: ForwardedRequest) -> AsyncIterator[list[Message]]:
        yield [{**START, "headers": [(b"content-type", media_type), (b"x-request-id", b"its own")]}, body(content)]

    return answer


def dies(*before: list[Message], error: Exception | None = None) -> Answer:
    async def answer(asked: ForwardedRequest) -> AsyncIterator[list[Message]]:
        for ready in before:
            yield ready
        raise error or ActorDiedError()

    return answer


def ask(handle: Handle, content: bytes = b"{}", headers: Any = (), **scope: Any) -> list[Message]:
    """What the ingress sends for a request."""
    config = ServerConfig("tiny", max_body_bytes=1000, max_queued_requests=7)
    forwarder = Forwarder(handle, config)
    app = application(forwarder, config)
    sent: list[Message] = []
    received = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        if received:
            return received.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    full = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"host", b"127.0.0.1"), *headers],
    }
    asyncio.run(app({**full, **scope}, receive, send))
    ask.counts = forwarder.counts  # type: ignore[attr-defined]
    return sent


def error_of(sent: list[Message]) -> tuple[int, dict[str, Any]]:
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]


def test_a_request_and_its_reply_are_passed_on() -> None:
    handle = Handle(whole(b'{"a": 1}'))
    sent = ask(handle, chat(image("https://a")), headers=[(b"x-request-id", b"given")])
    assert sent[0]["status"] == 200 and sent[1]["body"] == b'{"a": 1}'
    assert b"x-request-id" not in dict(sent[0]["headers"]), "Serve's proxy adds it"
    assert dict(handle.asked[0].scope["headers"])[b"x-request-id"] == b"given"
    assert handle.keys == [image_key(chat(image("https://a")))] and handle.cancelled == 0


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("away", b"1" * 16)])
def test_a_request_whose_replica_died_before_it_answered_goes_to_another(error: Exception) -> None:
    handle = Handle(dies(error=error), dies(error=error), whole())
    assert ask(handle)[0]["status"] == 200
    assert handle.answers == [] and ask.counts == {"retried": 2}  # type: ignore[attr-defined]


def test_a_request_that_replicas_die_of_is_given_up() -> None:
    status, error = error_of(ask(Handle(dies(), dies(), dies())))
    assert status == 502 and error["code"] == "replica_died" and error["type"] == "server_error"


def test_a_stream_whose_replica_died_ends_with_an_error_event() -> None:
    start = {**START, "headers": [(b"content-type", b"text/event-stream")]}
    sent = ask(Handle(dies([start, body(b"data: {}\n\n", more=True)])))
    assert [message["type"] for message in sent] == ["http.response.start", *2 * ["http.response.body"]]
    event, done = sent[-1]["body"].decode().split("\n\n")[:2]
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "replica_died" and done == "data: [DONE]"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (BackPressureError(num_queued_requests=7, max_queued_requests=7), 429, "7 requests wait"),
        (DeploymentUnavailableError("Replica"), 503, "no replica can be started"),
        (ValueError("of a library"), 500, "ValueError"),
    ],
)
def test_errors_have_openais_form(error: Exception, status: int, words: str) -> None:
    found, told = error_of(ask(Handle(dies(error=error))))
    assert found == status and words in told["message"] and "of a library" not in told["message"]


def test_what_is_refused_costs_no_replica_anything() -> None:
    assert error_of(ask(Handle(), b"x" * 1001))[0] == 413
    assert error_of(ask(Handle(), headers=[(b"content-length", b"1001")]))[0] == 413
    handle = Handle()
    assert error_of(ask(handle, headers=[(b"host", b"evil.example")]))[0] >= 400 and handle.keys == []


def test_a_websocket_is_refused() -> None:
    """Serve's proxy takes handshakes, and asks for no key. It wants a code."""
    handle = Handle()
    (refusal,) = ask(handle, type="websocket", method=None, path="/v1/models")
    assert refusal["type"] == "websocket.close" and refusal["code"] == 1008
    assert ask.counts == {"403": 1} and handle.keys == []  # type: ignore[attr-defined]


async def get(app: ASGIApp, path: str) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        if not asked:
            asked.append(path)
            return {"type": "http.request", "body": b""}
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    asked: list[str] = []
    headers = [(b"host", b"127.0.0.1")]
    await app({"type": "http", "http_version": "1.1", "method": "GET", "path": path, "headers": headers}, receive, send)
    return sent


@pytest.mark.parametrize("ends", [True, False])
def test_a_service_that_ends_refuses_new_requests_and_waits_for_those_that_run(ends: bool) -> None:
    """But not for ever."""

    async def check() -> None:
        has_begun, may_end = asyncio.Event(), asyncio.Event()

        async def answer(asked: ForwardedRequest) -> AsyncIterator[list[Message]]:
            has_begun.set()
            await may_end.wait()
            async for ready in whole()(asked):
                yield ready

        config = ServerConfig("tiny", shutdown_timeout=HANG_SECONDS if ends else 0.05)
        forwarder = Forwarder(Handle(answer), config)
        app = application(forwarder, config)
        running = asyncio.create_task(get(app, "/v1/models"))
        await has_begun.wait()
        drained = asyncio.create_task(forwarder.drain())
        await asyncio.sleep(0)
        for path in ("/v1/models", "/health"):
            status, error = error_of(await get(app, path))
            assert status == 503 and "shutting down" in error["message"] and error["code"] == "overloaded"
        if ends:
            assert not drained.done()
            may_end.set()
        await drained
        assert (await running)[0]["status"] == (200 if ends else 503)
        await forwarder.drain()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ([b"of-the:client.1"], True),
        ([b"two words <b>"], False),
        ([b"\xff"], False),
        ([b"x" * 129], False),
        ([], False),
        ([b"a", b"b"], True),
    ],
)
def test_serves_proxies_take_ids_by_the_rule_of_one_server(given: list[bytes], is_kept: bool) -> None:
    """Serve repeats any other header, and fails where it is not UTF-8."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    (layer,) = layers()
    headers = [(b"Host", b"a"), *((b"X-Request-Id", value) for value in given)]
    asyncio.run(layer.cls(app)({"type": "http", "headers": headers}, None, None))
    asyncio.run(layer.cls(app)({"type": "lifespan"}, None, None))
    (host, (name, value)), lifespan = seen[0]["headers"], seen[1]
    assert host == headers[0] and name == b"x-request-id" and lifespan == {"type": "lifespan"}
    assert value == given[-1] if is_kept else value not in given and value.isalnum()
