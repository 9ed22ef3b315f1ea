"""What a request takes of the queue, and what becomes of it when its client leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from dpn_rt.engine.engine import Engine, StepResult
from dpn_rt.errors import ShutdownError
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.server.admission import Admission
from dpn_rt.server.engine_client.messages import Abort, Add
from dpn_rt.server.engine_client.worker import _without_ended
from dpn_rt.server.errors import HttpError, OverloadedError
from tests.server.conftest import MODEL, Ask, StartServer
from tests.server.raw_http import connected, post

COMPLETIONS = "/v1/completions"


def many(prompts: int, n: int = 1, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": ["a"] * prompts, "n": n, "temperature": 1, "max_tokens": 1000, **fields}


@pytest.mark.parametrize(("prompts", "n"), [(4096, 64), (257, 1), (5, 64), (1, 64)])
def test_answers_count_not_prompts(start_server: StartServer, prompts: int, n: int) -> None:
    server = start_server(max_queued_requests=60)
    for stream in (False, True):
        reply = server.post(many(prompts, n, stream=stream), COMPLETIONS)
        assert reply.status_code == 400, "it could never be served"
        assert f"{prompts} prompts with n={n} are {prompts * n} answers: expected at most 60" in reply.text
    chat = server.post(Ask().body(n=61 if prompts > 60 else 62, temperature=1))
    assert chat.status_code == 400 and "answers: expected at most 60" in chat.json()["error"]["message"]
    assert server.post(many(1, 2, max_tokens=1), COMPLETIONS).status_code == 200


def test_their_tokens_count_too(start_server: StartServer) -> None:
    server = start_server(max_queued_tokens=1000)
    reply = server.post(many(4, 4, max_tokens=100), COMPLETIONS)
    assert reply.status_code == 400 and "tokens: expected at most 1000" in reply.json()["error"]["message"]
    assert server.post(many(2, 2, max_tokens=100), COMPLETIONS).status_code == 200


def test_a_prompt_gives_the_places_of_all_its_answers_back() -> None:
    admission = Admission(10, 1000)
    with admission.enter(80, 2, 4) as ticket:
        assert (admission.answers, admission.tokens) == (8, 80)
        with (
            pytest.raises(OverloadedError, match="8 answers are waiting and the request has 3"),
            admission.enter(1, 1, 3),
        ):
            pass
        ticket.leave()
        assert (admission.answers, admission.tokens) == (4, 40)
        with admission.enter(1, 1, 3):
            assert admission.answers == 7
    assert (admission.answers, admission.tokens, admission.active) == (0, 0, 0)
    with pytest.raises(HttpError, match="expected at most 10 answers"), admission.enter(1, 11):
        pass
    with admission.enter(5000):
        pass  # one answer alone is never too long for the queue


def test_clients_have_no_priority_unless_the_operator_says_so(start_server: StartServer) -> None:
    server = start_server()
    for priority in (-1000, -1, 1):
        reply = server.post(Ask().body(priority=priority))
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "priority"
        assert server.post(many(1, max_tokens=1, priority=priority), COMPLETIONS).status_code == 400
    for priority in (0, None):
        assert server.post(Ask().body(priority=priority)).status_code == 200
    server = start_server(allow_client_priority=True)
    assert server.post(Ask().body(priority=-1)).status_code == 200


def test_requests_that_were_aborted_before_they_were_taken_never_begin() -> None:
    def add(name: str) -> Add:
        return Add(name, None, SamplingParams(), 0)  # type: ignore[arg-type]

    refused: dict[str, Exception] = {}
    messages = [Abort("a"), add("a"), add("b"), add("c"), Abort("b"), add("b"), Abort("d"), add("e"), Abort("e")]
    left = _without_ended(messages, refused)
    assert left == [Abort("a"), add("a"), add("c"), Abort("b"), add("b"), Abort("d"), Abort("e")]
    assert set(refused) == {"b", "e"} and isinstance(refused["e"], ShutdownError)


def test_what_has_not_begun_is_dropped_when_its_client_leaves(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    go_on, added = threading.Event(), []
    step, add_request = Engine.step, Engine.add_request

    def waiting(self: Engine) -> StepResult:
        go_on.wait(20)
        return step(self)

    def noting(self: Engine, request_id: str, *arguments: Any, **options: Any) -> None:
        added.append(request_id)
        add_request(self, request_id, *arguments, **options)

    monkeypatch.setattr(Engine, "step", waiting)
    monkeypatch.setattr(Engine, "add_request", noting)
    with connected(server) as first:
        first.sendall(post(many(1), path=COMPLETIONS, close=False))
        until(lambda: added)
        with connected(server) as second:
            second.sendall(post(many(100), path=COMPLETIONS, close=False))
            until(lambda: server.service.engine.num_streams > 100)
        until(lambda: server.service.admission.active == 1)
    until(lambda: server.service.admission.active == 0)
    go_on.set()
    server.wait_until_idle()
    assert len(added) == 1


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.01)


def test_a_client_that_leaves_while_its_prompts_are_prepared(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    processor = type(server.service.preparation.processor)
    process, seen, go_on = processor.process, [], threading.Event()

    def slow(self: Any, prompt: Any) -> Any:
        seen.append(prompt)
        go_on.wait(20)
        return process(self, prompt)

    monkeypatch.setattr(processor, "process", slow)
    with connected(server) as client:
        client.sendall(post(many(100), path=COMPLETIONS, close=False))
        until(lambda: seen)
    until(lambda: server.server.connections.busy == 0)
    go_on.set()
    server.wait_until_idle()
    assert len(seen) <= 2
