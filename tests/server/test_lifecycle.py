"""Clients that leave, engines that fail or hang, queues and metrics."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dpn_rt import LLM, SamplingParams
from dpn_rt.engine.engine import Engine, StepResult
from dpn_rt.engine.prefill import Prefill
from dpn_rt.settings import EngineOptions
from tests.server.conftest import Ask, RunningServer, StartServer

LONG = Ask().body(max_tokens=600, ignore_eos=True)


def metrics(server: RunningServer) -> dict[str, float]:
    """Samples by name and label values, without the model's name and the bounds of histogram buckets."""
    samples = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name not in ("model_name", "le")]
            samples[" ".join([sample.name, *labels])] = sample.value
    return samples


def chunks(reply: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_client_that_leaves_a_stream_frees_its_blocks_and_is_counted(start_server: StartServer) -> None:
    server = start_server()
    with server.client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as reply:
        assert next(reply.iter_lines())
        assert server.service.engine.load.running == 1
        before = metrics(server)
    server.wait_until_idle()
    seen = metrics(server)
    assert seen["dpn_rt:prompt_tokens_total"] == before["dpn_rt:prompt_tokens_total"] > 256
    assert 0 < before["dpn_rt:generation_tokens_total"] <= seen["dpn_rt:generation_tokens_total"] < 600
    assert seen["dpn_rt:num_requests_running"] == 0
    assert seen["dpn_rt:request_success_total abort"] == 1


def test_client_that_leaves_without_streaming_frees_its_blocks_and_is_counted_once(start_server: StartServer) -> None:
    server = start_server()
    with pytest.raises(httpx.ReadTimeout):
        server.post(LONG, timeout=0.5)
    server.wait_until_idle(5)
    assert server.service.admission.answers == 0
    seen = metrics(server)
    assert seen["dpn_rt:request_success_total abort"] == 1
    assert not [name for name in seen if name.startswith("dpn_rt:request_refused_total")]


def test_requests_run_together_and_get_their_own_answers(server: RunningServer, llm: LLM) -> None:
    asks = [Ask(scene % 5, text) for scene, text in enumerate(("Is there a circle?", "What color?", "How many?") * 5)]
    with ThreadPoolExecutor(len(asks)) as pool:
        replies = list(pool.map(lambda ask: server.post(ask.body()), asks))
    for ask, reply in zip(asks, replies, strict=True):
        output = llm.chat(ask.local_messages, SamplingParams(temperature=0, max_tokens=8))[0]
        assert reply.json()["choices"][0]["message"]["content"] == output.outputs[0].text
    server.wait_until_idle()


def test_second_questions_about_an_image_find_it_computed(start_server: StartServer, llm: LLM) -> None:
    server = start_server()
    for number, text in enumerate(("Is there a circle?", "How many squares are there?", "What color is the star?")):
        ask = Ask(3, text)
        reply = server.post(ask.body()).json()
        expected = llm.chat(ask.local_messages, SamplingParams(temperature=0, max_tokens=8))[0]
        assert reply["choices"][0]["message"]["content"] == expected.outputs[0].text
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == 0 if number == 0 else cached > 256
    assert server.post(Ask(4).body()).json()["usage"]["prompt_tokens_details"]["cached_tokens"] < 48, "text alone"


def test_urgent_requests_overtake(start_server: StartServer) -> None:
    server = start_server(EngineOptions(max_num_seqs=1), allow_client_priority=True)
    finished: list[str] = []

    def ask(name: str, priority: int, max_tokens: int) -> None:
        assert server.post(Ask().body(priority=priority, max_tokens=max_tokens, ignore_eos=True)).status_code == 200
        finished.append(name)

    threads = []
    for name, priority, max_tokens, waiting in (("first", 0, 400, 0), ("late", 5, 4, 1), ("urgent", -1, 4, 2)):
        threads.append(threading.Thread(target=ask, args=(name, priority, max_tokens)))
        threads[-1].start()
        deadline = time.monotonic() + 20
        while server.service.engine.load.waiting < waiting or not server.service.engine.load.running:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert finished.index("urgent") < finished.index("late")


def test_metrics_count_what_was_served(start_server: StartServer) -> None:
    server = start_server()
    reply = server.post(Ask().body(route=[0, 1, 2], ignore_eos=True)).json()
    server.post(Ask().body(stream=True, ignore_eos=True))
    server.post({"model": "tiny"})
    seen = metrics(server)
    assert seen["dpn_rt:request_success_total length"] == 2
    assert "dpn_rt:request_success_total abort" not in seen
    assert seen["dpn_rt:generation_tokens_total"] == 16
    assert seen["dpn_rt:prompt_tokens_total"] == 2 * reply["usage"]["prompt_tokens"]
    assert seen["dpn_rt:visual_tokens_total 0"] == 512
    assert seen["dpn_rt:route_total 0,1,2"] >= 1
    assert seen["dpn_rt:prefill_flops_saved_total"] > 0
    assert seen["dpn_rt:request_refused_total 400"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert seen[f"dpn_rt:{name}_seconds_count"] == 2
    assert seen["dpn_rt:kv_cache_usage_perc"] == 0
    assert seen["dpn_rt:num_preemptions_total"] == 0
    assert seen["dpn_rt:image_cache_queries_total"] == 2 and seen["dpn_rt:image_cache_hits_total"] == 1
    assert seen["dpn_rt:prefix_cache_hits_total"] > 256
    assert seen["dpn_rt:prefix_cache_evictions_total"] == 0


def test_health_fails_while_the_engine_stands_still(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(stall_timeout=0.2)
    go_on = threading.Event()
    step = Engine.step

    def slow(self: Engine) -> StepResult:
        go_on.wait(20)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.post, Ask().body())
        deadline = time.monotonic() + 10
        while server.client.get("/health").status_code == 200:
            assert time.monotonic() < deadline, "health stays green while a request hangs"
        assert server.client.get("/health").json()["status"] == "stalled"
        go_on.set()
        assert reply.result().status_code == 200
    assert server.client.get("/health").status_code == 200


def test_a_step_that_fails_ends_its_requests_alone(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server()

    def broken(*_: object) -> None:
        raise ValueError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(Prefill, "advance", broken)
        reply = server.post(Ask().body())
        assert reply.status_code == 500 and "step failed" in reply.json()["error"]["message"]
        assert server.post(Ask().body(stream=True)).status_code == 500
    assert server.post(Ask().body()).status_code == 200
    assert server.client.get("/health").status_code == 200


def test_a_failure_in_the_middle_of_a_stream_is_an_event(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    runner = server.service.engine._process.engine.runner  # type: ignore[attr-defined]
    decode, calls = runner.decode, []

    def broken(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise ValueError("no such luck")
        return decode(*arguments)

    monkeypatch.setattr(runner, "decode", broken)
    reply = server.post(Ask().body(stream=True, ignore_eos=True))
    assert reply.status_code == 200
    events = chunks(reply)
    assert "choices" in events[0] and "step failed" in events[-1]["error"]["message"]
    server.wait_until_idle()


def test_a_client_that_does_not_read_keeps_no_server_whose_engine_has_ended(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()

    def broken(self: Engine) -> StepResult:
        raise MemoryError("nothing left")

    monkeypatch.setattr("dpn_rt.server.http_server.LAST_CHUNKS", 0.5)
    monkeypatch.setattr(Engine, "step", broken)
    with server.service.admission.enter(1, 1):
        assert server.post(Ask().body()).status_code == 500
        server.thread.join(20)
        assert not server.thread.is_alive()


def test_a_server_ends_with_its_engine(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server()

    def broken(self: Engine) -> StepResult:
        raise MemoryError("nothing left")

    monkeypatch.setattr(Engine, "step", broken)
    reply = server.post(Ask().body())
    assert reply.status_code == 500 and "the engine has stopped" in reply.json()["error"]["message"]
    server.thread.join(20)
    assert not server.thread.is_alive()
    assert "MemoryError('nothing left')" in str(server.server.failure)
    assert server.service.engine.stalled_seconds == float("inf")


@pytest.mark.parametrize("stream", [True, False])
def test_the_time_between_tokens_is_that_of_each_completion(start_server: StartServer, stream: bool) -> None:
    server = start_server()
    body = Ask().body(n=3, temperature=1, ignore_eos=True, max_tokens=8, stream=stream)
    started = time.monotonic()
    assert server.post(body).status_code == 200
    seconds = time.monotonic() - started
    found = metrics(server)
    assert found["dpn_rt:inter_token_latency_seconds_count"] == 3 * 7
    total, decoding = found["dpn_rt:inter_token_latency_seconds_sum"], found["dpn_rt:request_decode_time_seconds_sum"]
    assert 2 * decoding < total < 3 * seconds  # three side by side


def test_a_stream_has_its_line_in_the_log(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    server = start_server()
    assert server.post(Ask().body(stream=True), headers={"X-Request-Id": "whole"}).status_code == 200
    asked = Ask().body(stream=True, max_tokens=400, ignore_eos=True)
    with server.client.stream("POST", "/v1/chat/completions", json=asked, headers={"X-Request-Id": "left"}) as reply:
        next(reply.iter_lines())
    server.wait_until_idle()
    deadline = time.monotonic() + 20
    while not any("request left: the client left the stream after" in each for each in caplog.messages):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert any("request whole: streamed in" in each for each in caplog.messages)
