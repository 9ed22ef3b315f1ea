"""Two replicas on one machine: the same answers as one engine, by the replica that knows the image."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from benchmarks.load.http_questions import Question
from dpn_rt import LLM, SamplingParams
from dpn_rt.ray_serve.app import build
from dpn_rt.ray_serve.image_key import image_key
from dpn_rt.ray_serve.messages import REPLICA_HEADER
from dpn_rt.ray_serve.routing import preferred
from dpn_rt.serve_ray import APPLICATION
from examples.tiny_dpn import data
from tests.ray_serve.conftest import CAPACITY, HANG_SECONDS, MODEL, Service, arguments

SCENES, QUESTIONS, MAX_TOKENS = 12, 6, 8
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"route": [0, 0, 0]},
    {"route": [2, 1, None]},
    {"router_bias": 4.0},
    {"reduce": "none"},
)
REPLICA = REPLICA_HEADER.decode()
Asked = tuple[Question, dict[str, Any], str, list[int | None]]
"""A question, fields of its request, and the text and the route of its answer."""


@pytest.fixture(scope="module")
def asked(engine_dir: Path) -> list[Asked]:
    """Questions about scenes, and how one engine answers each alone."""
    llm, variants = LLM(engine_dir), cycle(VARIANTS)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    found: list[Asked] = []
    for number in range(SCENES):
        scene = data.sample("test", number)
        for question in random.sample(scene.questions, QUESTIONS):
            one, fields = Question(scene.image, question.text, MAX_TOKENS), next(variants)
            output = llm.chat(one.messages(), params, **fields)[0]
            found.append((one, fields, output.outputs[0].text, output.pyramid.experts))
    random.shuffle(found)
    return found


def said(reply: httpx.Response) -> tuple[str, list[int | None]]:
    """The text and the route of an answer, whole or streamed."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return reply.json()["choices"][0]["message"]["content"], reply.json()["pyramid"]["experts"]
    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    assert "error" not in chunks[-1], chunks[-1]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    return text, next(chunk["pyramid"]["experts"] for chunk in reversed(chunks) if "pyramid" in chunk)


def ask(service: Service, one: Asked, **fields: Any) -> httpx.Response:
    return service.post(one[0].body(MODEL, **one[1], **fields))


def metrics(service: Service) -> dict[tuple[str, str], float]:
    """(name, replica) -> the sum of its samples."""
    text = service.client.get("/metrics").text
    found: dict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, sample.labels.get("replica", "")] += sample.value
    return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Polls until something is true, however long that takes on a busy machine."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_answers_are_those_of_one_engine_and_images_go_to_the_replica_that_knows_them(
    service: Service, asked: list[Asked]
) -> None:
    """In rounds of one question about each image: what a round asks about is cached by the round before."""
    by_image: dict[str, list[Asked]] = defaultdict(list)
    for one in asked:
        by_image[one[0].url].append(one)
    replies: list[tuple[Asked, httpx.Response]] = []
    with ThreadPoolExecutor(4) as threads:
        for number, questions in enumerate(zip(*by_image.values(), strict=True)):
            streams = number % 3 == 0
            replies += zip(
                questions, threads.map(lambda one, s=streams: ask(service, one, stream=s), questions), strict=True
            )
    names = sorted(service.process_ids())
    replica_of = {url: known_by(one, names) for url, (one, *_) in by_image.items()}
    for one, reply in replies:
        assert reply.status_code == 200, reply.text
        assert said(reply) == one[2:], one[1:]
        assert reply.headers[REPLICA] == replica_of[one[0].url], "another replica than the image's was asked"

    found = metrics(service)
    assert {replica for name, replica in found if name.startswith("dpn_rt:num_requests")} == set(names)
    for name in names:
        images = sum(replica == name for replica in replica_of.values())
        assert found["dpn_rt:request_success_total", name] == images * QUESTIONS
        assert found["dpn_rt:image_cache_hits_total", name] == images * (QUESTIONS - 1)


def known_by(one: Asked, names: Iterable[str]) -> str:
    """Which of these replicas gets questions about an image."""
    key = image_key(json.dumps(one[0].body(MODEL)).encode())
    return str(preferred(key, {name: name for name in names}))


def test_everything_else_of_the_server_is_there(service: Service) -> None:
    client = service.client
    assert client.get("/health").json() == {"status": "ok", "replicas": 2}
    assert client.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert client.head("/health").status_code == 200 and client.head("/health").content == b""
    assert "<html" in client.get("/").text
    ids = service.post({"prompt": "What color?"}, "/tokenize").json()["tokens"]
    assert service.post({"tokens": ids}, "/detokenize").json()["prompt"].endswith("What color?")
    text = service.post(
        {"model": MODEL, "prompt": ["What", "Is"], "max_tokens": 3, "temperature": 0}, "/v1/completions"
    )
    assert len(text.json()["choices"]) == 2
    reply = client.get("/v1/models", headers={"x-request-id": "of-the-client"})
    assert reply.headers.get_list("x-request-id") == ["of-the-client"]
    for wrong in (b"two words <b>", b"\xff"):
        (given,) = client.get("/v1/models", headers={"x-request-id": wrong}).headers.get_list("x-request-id")
        assert given.isalnum()
    handshake = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    handshake["sec-websocket-key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
    assert client.get("/v1/models", headers=handshake).status_code == 403


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/chat/completions", {"model": "other", "messages": [{"role": "user", "content": "?"}]}, 404, "other"),
        ("/v1/chat/completions", {"model": MODEL, "messages": []}, 400, "messages"),
        (
            "/v1/chat/completions",
            {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "route": [9]},
            400,
            "route",
        ),
        ("/v1/nothing", {}, 404, "/v1/nothing"),
    ],
)
def test_refusals_are_those_of_the_server(service: Service, path: str, body: Any, status: int, words: str) -> None:
    reply = service.post(body, path)
    assert reply.status_code == status and words in reply.json()["error"]["message"], reply.text


def test_a_client_that_leaves_stops_its_request(service: Service, asked: list[Asked]) -> None:
    """The engines stand still meanwhile, so that the request cannot end by itself."""
    before = metrics(service)
    body = json.dumps(asked[0][0].body(MODEL, max_tokens=400, ignore_eos=True)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    name = known_by(asked[0], service.process_ids())
    with standing_still(service, name), socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(head.encode() + body)
        wait_until(lambda: since(before, PREPARED, service, name) == 1, "the request does not arrive")
        client.close()
        wait_until(lambda: since(before, ENDED, service, name) == 1, "the client's leaving is not noticed")
    wait_until(lambda: not metrics(service)["dpn_rt:num_requests_running", name], "the request still runs")
    assert said(ask(service, asked[0])) == asked[0][2:]


PREPARED, ENDED = "dpn_rt:request_preparation_time_seconds_count", "dpn_rt:request_success_total"
"""Counted by a replica's server when a request goes to the engine, and when it has ended or its client has left."""


def since(before: dict[tuple[str, str], float], counter: str, service: Service, replica: str) -> float:
    return metrics(service)[counter, replica] - before[counter, replica]


def engine_of(service: Service, replica: str) -> psutil.Process:
    """The process of a replica's engine."""
    children = psutil.Process(service.process_ids()[replica]).children()
    return next(child for child in children if "engine_client.worker" in " ".join(child.cmdline()))


@contextmanager
def standing_still(service: Service, replica: str) -> Iterator[psutil.Process]:
    """A replica whose engine answers nothing, and is in no hurry: it is well for `stall_timeout` seconds."""
    engine = engine_of(service, replica)
    engine.suspend()
    try:
        yield engine
    finally:
        with suppress(psutil.NoSuchProcess):
            engine.resume()


def test_a_replica_that_is_full_leaves_requests_about_its_image_to_the_other(
    service: Service, asked: list[Asked]
) -> None:
    one, before, names = asked[0], metrics(service), service.process_ids()
    known = known_by(one, names)
    with ThreadPoolExecutor(CAPACITY) as threads:
        with standing_still(service, known):
            held = [threads.submit(ask, service, one) for _ in range(CAPACITY)]
            wait_until(lambda: since(before, PREPARED, service, known) == CAPACITY, "it does not become full")
            reply = ask(service, one)
            assert reply.headers[REPLICA] != known and said(reply) == one[2:]
            assert not any(each.done() for each in held)
        for each in held:
            assert each.result().headers[REPLICA] == known and said(each.result()) == one[2:]


def test_no_request_is_lost_when_a_replica_is_killed(service: Service, asked: list[Asked]) -> None:
    before = service.process_ids()
    victim = random.choice(sorted(before))
    requests = [(one, number % 2 == 0) for number, one in enumerate(asked)]

    def answer(pair: tuple[Asked, bool]) -> str:
        one, stream = pair
        reply = ask(service, one, stream=stream)
        if reply.status_code == 200 and "replica_died" not in reply.text:
            assert said(reply) == one[2:]
            return "right"
        assert "replica_died" in reply.text, reply.text
        return "told"

    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(answer, pair) for pair in requests]
        list(islice(as_completed(answers), 10))
        os.kill(before[victim], signal.SIGKILL)
        counts = Counter(each.result() for each in answers)
    assert counts["right"] + counts["told"] == len(requests) and counts["told"] <= 6, counts
    wait_until(lambda: len(service.process_ids()) == 2 and victim not in service.process_ids(), "it does not come back")
    assert said(ask(service, asked[0])) == asked[0][2:]
    assert service.client.get("/health").json()["replicas"] == 2


def test_requests_of_an_engine_that_ends_go_to_the_other_replica(service: Service, asked: list[Asked]) -> None:
    """Those that it had, and those that come before Serve has replaced it."""
    one, before, name = asked[0], metrics(service), known_by(asked[0], service.process_ids())
    with ThreadPoolExecutor(4) as threads:
        with standing_still(service, name) as engine:
            held = [threads.submit(ask, service, one, stream=bool(i % 2)) for i in range(4)]
            wait_until(lambda: since(before, PREPARED, service, name) == 4, "the requests do not arrive")
            engine.kill()
        for each in held:
            assert each.result().status_code == 200 and said(each.result()) == one[2:], each.result().text
            assert each.result().headers[REPLICA] != name
        for each, reply in zip(asked, threads.map(lambda each: ask(service, each), asked), strict=True):
            assert reply.status_code == 200 and said(reply) == each[2:], reply.text
    wait_until(lambda: name not in service.process_ids() and len(service.process_ids()) == 2, "it is not replaced")


def test_a_replica_without_requests_whose_engine_has_ended_is_replaced(service: Service, asked: list[Asked]) -> None:
    name = min(service.process_ids())
    engine_of(service, name).kill()
    wait_until(lambda: name not in service.process_ids() and len(service.process_ids()) == 2, "it is not replaced")
    assert said(ask(service, asked[0])) == asked[0][2:]


def test_fewer_replicas_lose_no_request(service: Service, engine_dir: Path, asked: list[Asked]) -> None:
    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(ask, service, one, stream=bool(i % 2)) for i, one in enumerate(asked)]
        list(islice(as_completed(answers), 10))
        serve.run(build(arguments(engine_dir, replicas=1)), name=APPLICATION)
        replies = [each.result() for each in answers]
    for one, reply in zip(asked, replies, strict=True):
        assert reply.status_code == 200 and said(reply) == one[2:], reply.text
    wait_until(lambda: len(service.process_ids()) == 1, "a replica is left over")


def test_sigterm_lets_running_requests_end(service: Service, asked: list[Asked]) -> None:
    """The last test: the cluster ends. The engine stands still, so that a request runs as long as that."""
    body = asked[0][0].body(MODEL, max_tokens=400, ignore_eos=True, stream=True)
    name = known_by(asked[0], service.process_ids())
    with service.client.stream("POST", "/v1/chat/completions", json=body) as reply:
        events = reply.iter_lines()
        first = next(events)
        with standing_still(service, name):
            ray.shutdown()  # the cluster is about to go
            service.process.send_signal(signal.SIGTERM)
            wait_until(lambda: service.client.get("/v1/models").status_code != 200, "new requests are taken")
            for path in ("/v1/models", "/health"):
                refused = service.client.get(path)
                assert refused.status_code == 503 and refused.headers["retry-after"], refused.text
                assert "shutting down" in refused.json()["error"]["message"]
        assert [first, *(line for line in events if line)][-1] == "data: [DONE]"
    assert service.process.wait(HANG_SECONDS) == 0, service.output
    assert not list(service.folder.rglob("usage_stats.json")), "Ray's makers are told nothing"
    assert not (service.folder / "home").exists(), "nothing is written elsewhere"
