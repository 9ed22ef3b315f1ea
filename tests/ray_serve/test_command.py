"""What `python -m dpn_rt.serve_ray` says of what cannot work. What works: `test_service.py`."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dpn_rt import DpnError, serve_ray
from dpn_rt.engine import loader
from dpn_rt.errors import CapacityError
from dpn_rt.memory import telling_memory
from dpn_rt.ray_cluster import check_room
from tests.ray_serve.conftest import free_port


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replicas", "0"], "--replicas 0: expected at least 1"),
        (["--min-replicas", "3", "--max-replicas", "2"], "max_replicas=2: expected at least min_replicas=3"),
        (["--upscale-delay", "-1", "--max-replicas", "2"], "--upscale-delay -1.0: expected at least 0"),
        (["--target-ongoing-requests", "5"], "--target-ongoing-requests 5: expected --max-replicas as well"),
        (["--min-replicas", "2"], "--min-replicas 2: expected --max-replicas as well"),
        (["--cpus-per-replica", "inf"], "--cpus-per-replica inf: expected a finite number"),
        (["--health-check-period", "nan"], "--health-check-period nan: expected a finite number"),
        (["--port", "0"], "--port 0: expected 1 to 65535"),
        (["--otlp-traces-endpoint", "http://x"], "--otlp-traces-endpoint: expected none, replicas on Ray send no .*"),
        (["--capacity", "0"], "--capacity 0: expected at least 1"),
        (["--max-num-seqs", "0"], "max_num_seqs=0: expected a whole number of at least 1"),
    ],
)
def test_wrong_options_are_told(options: list[str], words: str) -> None:
    with pytest.raises(DpnError, match=f"^{words}$"):
        serve_ray.service_options(serve_ray.parser().parse_args(["--engine", "engine", *options]))


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a cluster is a failure."""

    def init(*_: Any, **__: Any) -> None:
        raise AssertionError("a cluster is started")

    monkeypatch.setattr(ray, "init", init)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "203.0.113.7"], "--host 203.0.113.7 --port "),
        (["--ssl-keyfile", "key.pem"], "--ssl-keyfile without --ssl-certfile"),
        (["--ssl-certfile", "nowhere.pem"], "nowhere.pem: no such file"),
        (["--device", "tpu"], "--device 'tpu': expected"),
        (["--reduce", "fastv:k=2"], "fastv"),
        (["--kv-cache-bytes", "-1"], "--kv-cache-bytes -1: expected"),
        (["--ray-temp-dir", "/tmp/" + "x" * 60], "65 bytes long, expected at most 43"),
        (["--ray-temp-dir", "/dev/null/x"], "--ray-temp-dir /dev/null/x: cannot be made: Not a directory"),
    ],
)
def test_what_cannot_work_is_told_before_a_cluster_is_started(
    engine_dir: Path, no_cluster: None, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    with free_port() as port:
        assert serve_ray.main(["--engine", str(engine_dir), "--port", str(port), *options]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and words in told and told.count("\n") == 1, told


def test_a_port_in_use_is_told(engine_dir: Path, no_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve_ray.main(["--engine", str(engine_dir), "--port", str(port)]) == 1
    told = capsys.readouterr().err
    assert f"error: --host 127.0.0.1 --port {port}: " in told and "already in use" in told


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, "x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_lack_of_memory_is_told(
    engine_dir: Path,
    no_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(loader, "load_processor", load)
    with free_port() as port:
        assert serve_ray.main(["--engine", str(engine_dir), "--port", str(port)]) == 1
    assert "not enough memory to load the engine" in capsys.readouterr().err
    with pytest.raises(CapacityError, match="not enough memory"), telling_memory(engine_dir):
        raise error


def test_no_cluster_at_an_address_is_told(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(address: str | None) -> None:
        raise ConnectionError("of Ray")

    monkeypatch.setattr(ray, "init", init)
    assert serve_ray.main(["--engine", str(engine_dir), "--ray-address", "127.0.0.1:1"]) == 1
    told = capsys.readouterr().err
    assert "--ray-address 127.0.0.1:1: no Ray cluster" in told and "of Ray" not in told


class Serve:
    """A stand-in for Ray Serve, whose calls fail as the real ones do."""

    def __init__(self, start: Exception | None = None, run: Exception | None = None) -> None:
        self._start, self._run = start, run

    def start(self, **_: Any) -> None:
        if self._start is not None:
            raise self._start

    def run(self, *_: Any, **__: Any) -> None:
        assert self._run is not None
        raise self._run


FAILED = """Deploying application dpn_rt failed: Failed to update the deployments ['Replica'], retried 3 times. Error:
ray::ServeReplica:dpn_rt:Replica.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
RuntimeError: Traceback (most recent call last):
  File "replica.py", line 1, in initialize
dpn_rt.errors.EngineError: weights.safetensors: other sha256 than recorded

During handling of the above exception, another exception occurred:
dpn_rt.errors.CapacityError: e: not enough memory to load the engine
"""
"""What Ray Serve says, shortened."""


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        (Serve(start=RuntimeError("Failed to bind")), "--port 8000: Ray Serve cannot listen there"),
        (Serve(run=RuntimeError(FAILED)), "cannot be started: e: not enough memory to load the engine"),
        (Serve(run=RuntimeError("of Ray")), "cannot be started: the lines above say why"),
    ],
)
def test_what_replicas_say_is_told(serve: Serve, words: str) -> None:
    options = serve_ray.parser().parse_args(["--engine", "engine"])
    with pytest.raises(DpnError) as told:
        serve_ray._start(serve, None, options)
    assert str(told.value).endswith(words) or (words in str(told.value) and "of Ray" not in str(told.value))


def test_a_cluster_without_room_is_refused() -> None:
    cluster = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0})
    none = "--gpus-per-replica 0", 0.0
    check_room(cluster, "2 replicas", 2, ("--cpus-per-replica 2", 2.0), none)
    with pytest.raises(DpnError, match="3 replicas with --cpus-per-replica 2 need 6 cores: expected at most 4"):
        check_room(cluster, "3 replicas", 3, ("--cpus-per-replica 2", 2.0), none)
    with pytest.raises(DpnError, match="1 replicas with --gpus-per-replica 0.5 need 0.5 GPUs: expected at most 0"):
        check_room(cluster, "1 replicas", 1, ("--cpus-per-replica 1", 1.0), ("--gpus-per-replica 0.5", 0.5))


def test_a_folder_without_an_engine_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_ray.main(["--engine", str(tmp_path)]) == 1
    assert "engine.json" in capsys.readouterr().err


def test_missing_packages_of_the_server_are_told(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["prometheus_client"] = None
from dpn_rt import serve_ray
sys.exit(serve_ray.main(["--engine", "x"]))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("error: the server needs the package prometheus_client"), done.stderr


def test_the_base_install_does_without_ray(tmp_path: Path) -> None:
    """All other modules can be imported; what needs Ray says how to install it."""
    script = textwrap.dedent("""
        import sys
        sys.modules["ray"] = None
        import dpn_rt, dpn_rt.llm, dpn_rt.generate, dpn_rt.serve, dpn_rt.server.app, dpn_rt.evaluate, dpn_rt.batch
        from dpn_rt import DpnError, serve_ray
        from dpn_rt.evaluate.ray_answers import RayEngines
        for use in (lambda: dpn_rt.batch.build_processor("x"), lambda: serve_ray._serve(None), RayEngines):
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
