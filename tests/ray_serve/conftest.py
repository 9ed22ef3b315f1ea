from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from dpn_rt.builders.native import build_engine
from dpn_rt.ray_serve.app import build
from tests.ray_cluster import ray_cluster

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_dpn" / "checkpoint"
MODEL = "tiny"
APPLICATION = "tests"
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

    port: int
    client: httpx.Client
    replicas: DeploymentHandle[Any]

    def post(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def process_ids(self) -> dict[str, int]:
        """Of the replicas, by their names."""
        return dict(self.replicas.broadcast("process_ids").results(timeout_s=HANG_SECONDS))


@pytest.fixture(scope="module")
def service(engine_dir: Path) -> Iterator[Service]:
    with ray_cluster(num_cpus=2), free_port() as port:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(arguments(engine_dir)), name=APPLICATION)
        limits = httpx.Limits(max_connections=2 * CAPACITY)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG_SECONDS, limits=limits) as client:
            yield Service(port, client, serve.get_deployment_handle("Replica", APPLICATION))
        serve.shutdown()


def arguments(engine_dir: Path, **changes: Any) -> dict[str, Any]:
    """As in a Serve config file."""
    return {
        "engine": str(engine_dir),
        "replicas": 2,
        "capacity": CAPACITY,
        "engine_options": {"max_num_seqs": 8, "max_chunk_tokens": 64, "reuse_bytes": 2**24},
        "server": {"stall_timeout": HANG_SECONDS},
        "health_check_period": 1.0,
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
