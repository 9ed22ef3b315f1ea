from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from dpn_rt.builders.native import build_engine
from dpn_rt.serve_ray import APPLICATION

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_dpn" / "checkpoint"
MODEL = "tiny"
KV_CACHE_BYTES = 50_000_000
CAPACITY = 80
"""Requests of a replica at a time: more than a test has that does not mean to fill it."""
HANG_SECONDS = 600.0
"""What takes so long hangs; nothing that is tested is expected to be fast."""


@pytest.fixture(scope="session")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in float32: answers do not depend on what else is in a batch."""
    return build_engine(CHECKPOINT, tmp_path_factory.mktemp("ray") / MODEL, dtype="float32").path


@dataclass
class Service:
    """A service on Ray, and a client of it."""

    process: subprocess.Popen[bytes]
    """Of the command."""
    folder: Path
    """Of the cluster's files, and of all that the command writes elsewhere."""
    port: int
    client: httpx.Client
    replicas: DeploymentHandle[Any]

    def post(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def process_ids(self) -> dict[str, int]:
        """Of the replicas, by their names; without those that have just died."""
        answers = self.replicas.broadcast("process_ids").results(timeout_s=HANG_SECONDS, return_exceptions=True)
        return dict(answer for answer in answers if isinstance(answer, tuple))

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()


@pytest.fixture(scope="module")
def service(engine_dir: Path) -> Iterator[Service]:
    """`python -m dpn_rt.serve_ray` with a cluster of its own, which the tests join."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets are short
    environment = {name: value for name, value in os.environ.items() if name != "RAY_USAGE_STATS_ENABLED"}
    environment["HOME"] = str(folder / "home")
    with ExitStack() as stack, free_port() as port:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        output = stack.enter_context((folder / "output").open("wb"))
        command = [sys.executable, "-m", "dpn_rt.serve_ray", "--ray-temp-dir", str(folder), "--port", str(port)]
        process = subprocess.Popen(
            [*command, *options(engine_dir)], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        stack.callback(end, process)
        while f"serving {MODEL} on port {port}" not in (told := (folder / "output").read_text()):
            assert process.poll() is None, told
            time.sleep(0.1)
        ray.init(cluster_address(process), log_to_driver=False)
        stack.callback(ray.shutdown)
        limits = httpx.Limits(max_connections=2 * CAPACITY)
        url = f"http://127.0.0.1:{port}"
        client = stack.enter_context(httpx.Client(base_url=url, timeout=HANG_SECONDS, limits=limits))
        yield Service(process, folder, port, client, serve.get_deployment_handle("Replica", APPLICATION))


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a command that is still there after a test has failed, and its cluster with it."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def cluster_address(process: subprocess.Popen[bytes]) -> str:
    """Of the cluster that a process has started."""
    words = (word for child in psutil.Process(process.pid).children() for word in child.cmdline())
    return next(word.partition("=")[2] for word in words if word.startswith("--gcs-address="))


def options(engine_dir: Path) -> list[str]:
    """Of the command: `arguments`, and half a core for each replica."""
    values = {
        "engine": engine_dir,
        "replicas": 2,
        "capacity": CAPACITY,
        "max-num-seqs": 8,
        "max-chunk-tokens": 64,
        "reuse-bytes": 2**24,
        "kv-cache-bytes": KV_CACHE_BYTES,
        "stall-timeout": HANG_SECONDS,
        "shutdown-timeout": HANG_SECONDS,
        "health-check-period": 1.0,
        "cpus-per-replica": 0.5,
        "log-level": "warning",
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def arguments(engine_dir: Path, **changes: Any) -> dict[str, Any]:
    """As in a Serve config file."""
    return {
        "engine": str(engine_dir),
        "replicas": 2,
        "capacity": CAPACITY,
        "engine_options": {
            "max_num_seqs": 8,
            "max_chunk_tokens": 64,
            "reuse_bytes": 2**24,
            "kv_cache_bytes": KV_CACHE_BYTES,
        },
        "server": {"stall_timeout": HANG_SECONDS, "shutdown_timeout": HANG_SECONDS},
        "health_check_period": 1.0,
        "cpus_per_replica": 0.5,
        "log_level": "warning",
        **changes,
    }


def free_port() -> FreePort:
    return FreePort()


class FreePort:
    """A port that nothing listens on; another process could take it before it is used."""

    def __enter__(self) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    def __exit__(self, *_: object) -> None:
        pass
