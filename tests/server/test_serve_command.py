"""`python -m dpn_rt.serve` as a process: it starts, drains, aborts, and survives kill -9."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from dpn_rt import serve
from dpn_rt.engine import loader
from tests.server.command import post, serving
from tests.server.conftest import Ask


@pytest.mark.parametrize(
    ("number", "imports_anew"), [(signal.SIGTERM, True), (signal.SIGHUP, False)], ids=["SIGTERM", "SIGHUP"]
)
def test_a_signal_lets_running_requests_end(engine_dir: Path, number: int, imports_anew: bool) -> None:
    """To the whole group, as a terminal sends it."""
    with serving(engine_dir, imports_anew=imports_anew, start_new_session=True) as (process, url, _):
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=Ask().body(max_tokens=300, ignore_eos=True, stream=True)
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.killpg(process.pid, number)
            time.sleep(0.1)
            refused = post(url, Ask().body())
            assert refused.status_code == 503 and refused.headers["Retry-After"]
            assert httpx.get(f"{url}/health").status_code == 503
            text = "\n".join(lines)
        assert '"finish_reason":"length"' in text and "[DONE]" in text
        assert process.wait(20) == 0


def test_after_the_timeout_what_is_left_is_aborted(engine_dir: Path) -> None:
    with serving(engine_dir, "--shutdown-timeout", "0") as (process, url, _):
        body = Ask().body(max_tokens=700, ignore_eos=True, stream=True)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert '"finish_reason":"abort"' in text and "[DONE]" in text
        assert process.wait(20) == 0


def test_kill_and_restart(engine_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in engine_dir.rglob("*")}
    body = Ask().body(max_tokens=300, stream=True, ignore_eos=True)
    with (
        serving(engine_dir) as (process, url, _),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        (engine,) = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            list(lines)
        engine.wait(5)
    assert {path: path.stat().st_mtime_ns for path in engine_dir.rglob("*")} == before
    with serving(engine_dir) as (_, url, _):
        assert post(url, Ask().body()).status_code == 200


def test_a_server_whose_engine_is_killed_ends_for_its_supervisor(engine_dir: Path) -> None:
    body = Ask().body(max_tokens=700, stream=True, ignore_eos=True)
    with serving(engine_dir) as (process, url, lines):
        (engine,) = psutil.Process(process.pid).children()
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
            events = reply.iter_lines()
            next(events)
            engine.kill()
            text = "\n".join(events)
        assert "killed by SIGKILL" in text and text.rstrip().endswith("[DONE]")
        assert process.wait(20) == 1
        time.sleep(0.2)
    assert any("killed by SIGKILL" in line for line in lines)
    assert not any("Traceback" in line for line in lines if line.startswith("error:"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_second_signal_ends_at_once_even_where_the_engine_stands_still(engine_dir: Path, stream: bool) -> None:
    body = Ask().body(max_tokens=700, ignore_eos=True, stream=stream)
    with serving(engine_dir, "--shutdown-timeout", "600") as (process, url, lines):
        (engine,) = psutil.Process(process.pid).children()
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(post, url, body)
            wait_until(lambda: 'num_requests_running{model_name="tiny"} 1.0' in httpx.get(f"{url}/metrics").text)
            engine.suspend()
            waiting = pool.submit(post, url, Ask(1).body())
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: any("no new requests" in line for line in lines))
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            replies = running.result(), waiting.result()
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    events = replies[0].text.splitlines()
    errors = [replies[1].json()["error"]]
    if stream:
        assert replies[0].status_code == 200 and [line for line in events if line][-1] == "data: [DONE]"
        errors.append(json.loads([line for line in events if line][-2].removeprefix("data: "))["error"])
    else:
        assert replies[0].status_code == 503
        errors.append(replies[0].json()["error"])
    assert replies[1].status_code == 503
    for error in errors:
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "overloaded_error"
    assert not any("Traceback" in line for line in lines)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.02)


def test_ctrl_c_drains_like_sigterm(engine_dir: Path) -> None:
    with serving(engine_dir, start_new_session=True) as (process, url, _):
        body = Ask().body(max_tokens=300, ignore_eos=True, stream=True)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.killpg(process.pid, signal.SIGINT)
            text = "\n".join(lines)
        assert '"finish_reason":"length"' in text and "[DONE]" in text
        assert process.wait(20) == 0


def test_logs_name_requests_and_never_their_content(engine_dir: Path) -> None:
    with serving(engine_dir, "--log-json", "--log-level", "debug") as (process, url, lines):
        headers = {"X-Request-Id": "request-7"}
        assert post(url, Ask(text="my secret question").body(), headers=headers).status_code == 200
        assert post(url, Ask(text="my secret question").body(temperature=-1), headers=headers).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        time.sleep(0.2)
    text = "".join(lines)
    assert "secret" not in text and "base64" not in text
    entries = [json.loads(line) for line in lines]
    assert sum("request-7" in entry["message"] for entry in entries) == 2


def test_ctrl_c_while_the_engine_is_loaded(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "load_processor", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    children = psutil.Process().children()
    assert serve.main(["--engine", str(engine_dir), "--port", "0"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert psutil.Process().children() == children, "the engine's process is left"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-queued-requests", "0"], "--max-queued-requests 0: expected at least 1"),
        (["--allowed-media-domains", "http://x"], "--allowed-media-domains: 'http://x' would match no URL"),
        (["--allowed-local-media-path", "nowhere"], "--allowed-local-media-path: 'nowhere' is not a folder"),
        (["--allowed-hosts", "http://x"], "--allowed-hosts: 'http://x' would match no request"),
        (["--allowed-methods", "GET"], "--allowed-methods: no effect without allowed origins"),
        (["--media-timeout", "0"], "--media-timeout: 0.0, expected more than 0 seconds"),
        (["--reuse-bytes", "-1"], "--reuse-bytes -1: expected at least 0"),
        (["--max-chunk-tokens", "-1"], "--max-chunk-tokens -1: expected at least 0"),
        (["--max-model-len", "1000000"], "--max-model-len 1000000: expected at most"),
        (["--max-num-seqs", "0"], "--max-num-seqs 0: expected"),
        (["--host", ""], "--host '': expected an address of this machine, or 0.0.0.0 for all"),
    ],
)
def test_wrong_options_are_refused_by_name(
    engine_dir: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--engine", str(engine_dir), *options]) == 1
    told = capsys.readouterr().err
    assert f"error: {message}" in told and "Traceback" not in told


def test_a_list_of_names_that_is_none_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ('["a"', "[1]"):
        with pytest.raises(SystemExit):
            serve.main(["--engine", "nowhere", "--allowed-hosts", text])
        assert f"argument --allowed-hosts: '{text}': expected a name, or a list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("port", "message"), [(None, "already in use"), ("70000", "--port 70000: expected 0 to 65535"), ("-1", "--port -1")]
)
def test_a_port_in_use_is_refused_before_an_engine_is_loaded(
    port: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = port or str(taken.getsockname()[1])
        assert serve.main(["--engine", "nowhere", f"--port={number}"]) == 1
    told = capsys.readouterr().err
    assert message in told and "nowhere" not in told and "Traceback" not in told


def test_an_empty_name_of_the_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It is easily a variable that is not set."""
    assert serve.main(["--engine", "nowhere", "--served-model-name", " "]) == 1
    assert capsys.readouterr().err == "error: --served-model-name ' ': expected a name\n"


@pytest.mark.parametrize("kind", ["traces", "metrics"])
def test_a_collector_that_is_no_url_is_refused_before_an_engine_is_loaded(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--engine", "nowhere", "--port=0", f"--otlp-{kind}-endpoint", "localhost:4318"]) == 1
    told = capsys.readouterr().err
    assert "'localhost:4318': expected a URL" in told and f"/v1/{kind}" in told and "nowhere" not in told
