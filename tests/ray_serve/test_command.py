"""`python -m dpn_rt.serve_ray` as a process, and what it says of wrong options."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dpn_rt import DpnError, serve_ray
from tests.ray_serve.conftest import free_port


def test_sigterm_lets_running_requests_end(engine_dir: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    options = [
        "--engine",
        str(engine_dir),
        "--cpus-per-replica",
        "1",
        "--ray-temp-dir",
        str(folder),
        "--kv-cache-bytes",
        "50000000",
    ]
    with free_port() as port:
        command = [sys.executable, "-m", "dpn_rt.serve_ray", *options, "--port", str(port), "--shutdown-timeout", "30"]
    home = folder / "home"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_USAGE_STATS_ENABLED"}
    environment["HOME"] = str(home)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "serving" in line:
                break
        assert f"serving tiny on port {port}" in lines[-1], "".join(lines)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "temperature": 0}
        body |= {"max_tokens": 400, "ignore_eos": True, "stream": True}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with ThreadPoolExecutor(1) as thread, httpx.stream("POST", url, json=body, timeout=60) as reply:
            events = reply.iter_lines()
            first = next(events)
            process.send_signal(signal.SIGTERM)
            rest = thread.submit(process.stdout.read)
            assert [first, *(line for line in events if line)][-1] == "data: [DONE]"
            output = rest.result()
        assert process.wait(60) == 0, output
        assert not list(folder.rglob("usage_stats.json")), "Ray's makers are told nothing"
        assert not home.exists(), "nothing is written elsewhere"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replicas", "0"], "--replicas"),
        (["--min-replicas", "3", "--max-replicas", "2"], "min_replicas=3"),
        (["--port", "0"], "--port 0"),
        (["--otlp-traces-endpoint", "http://x"], "--otlp-traces-endpoint"),
        (["--capacity", "0"], "--capacity"),
        (["--max-num-seqs", "0"], "max_num_seqs=0"),
    ],
)
def test_wrong_options_are_told(options: list[str], words: str) -> None:
    with pytest.raises(DpnError, match=words):
        serve_ray.service_options(serve_ray.parser().parse_args(["--engine", "engine", *options]))


def test_a_folder_without_an_engine_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_ray.main(["--engine", str(tmp_path)]) == 1
    assert "engine.json" in capsys.readouterr().err


def test_the_base_install_does_without_ray(tmp_path: Path) -> None:
    """All other modules can be imported; what needs Ray says how to install it."""
    script = textwrap.dedent("""
        import sys
        sys.modules["ray"] = None
        import dpn_rt, dpn_rt.llm, dpn_rt.generate, dpn_rt.serve, dpn_rt.server.app, dpn_rt.evaluate, dpn_rt.batch
        from dpn_rt import DpnError, serve_ray
        for use in (lambda: dpn_rt.batch.build_processor("x"), lambda: serve_ray._serve(None)):
            try:
                use()
            except DpnError as error:
                assert "[ray]" in str(error), error
            else:
                raise AssertionError("it needs Ray")
        assert serve_ray.main(["--engine", "x"]) == 1
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[ray]" in done.stderr
