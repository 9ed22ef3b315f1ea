from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import http.server
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.engine.loader import load_bare_engine, load_processor
from dpn_rt.prompts.processor import Processor
from dpn_rt.reference import EagerDpn
from dpn_rt.server.app import create_app
from dpn_rt.server.config import ServerConfig
from dpn_rt.server.engine_client.messages import EngineSource
from dpn_rt.server.engine_client.process import EngineProcess
from dpn_rt.server.gen_ai import GenAiMetrics
from dpn_rt.server.http_server import Server, uvicorn_config
from dpn_rt.server.service import Service
from dpn_rt.server.tracing import Tracing
from dpn_rt.settings import EngineOptions
from examples.tiny_dpn import data, train
from examples.tiny_dpn.model import model_config
from examples.tiny_dpn.tokenizer import train_tokenizer
from tests.server.local_engine import LocalEngine

MODEL = "tiny"
OPTIONS = EngineOptions(max_num_seqs=8, max_chunk_tokens=64, reuse_bytes=2**24)


@pytest.fixture(scope="session")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that give every question its own answer and route."""
    folder = tmp_path_factory.mktemp("server")
    torch.manual_seed(7)
    model = EagerDpn(model_config("dpn", train_tokenizer().get_vocab_size())).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 8.0 if "predictor" in name else parameter.shape[-1] ** -0.5)
    train.save_checkpoint(model, folder / "checkpoint")
    return build_engine(folder / "checkpoint", folder / MODEL, dtype="float32").path


@pytest.fixture(scope="session")
def llm(engine_dir: Path) -> LLM:
    return LLM(engine_dir)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


@functools.cache
def scene_url(number: int) -> str:
    """A test scene as a data URL."""
    return data_url(png(data.sample("test", number).image))


@dataclass(frozen=True)
class Ask:
    """A question about a test scene."""

    scene: int = 0
    text: str = "What color is the background?"

    @property
    def image(self) -> Image.Image:
        return data.sample("test", self.scene).image

    @property
    def messages(self) -> list[dict[str, Any]]:
        content = [
            {"type": "image_url", "image_url": {"url": scene_url(self.scene)}},
            {"type": "text", "text": self.text},
        ]
        return [{"role": "user", "content": content}]

    @property
    def local_messages(self) -> list[dict[str, Any]]:
        """The same question, as `LLM.chat` takes it."""
        content = [{"type": "image", "image": self.image}, {"type": "text", "text": self.text}]
        return [{"role": "user", "content": content}]

    def body(self, **fields: Any) -> dict[str, Any]:
        return {"model": MODEL, "messages": self.messages, "temperature": 0, "max_tokens": 8, **fields}


@dataclass
class RunningServer:
    url: str
    service: Service
    server: Server
    thread: threading.Thread
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def post(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    @property
    def free_blocks(self) -> int:
        load = self.service.engine.load
        return load.kv_blocks - load.kv_blocks_used

    def wait_until_idle(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while self.service.admission.active or self.service.engine.load.kv_blocks_used:
            assert time.monotonic() < deadline, "requests or KV blocks are left"
            time.sleep(0.01)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


StartServer = Callable[..., RunningServer]


@pytest.fixture
def start_server(engine_dir: Path) -> Iterator[StartServer]:
    """Starts servers, each on its own port, that end with the test. Their engines are in this process, where tests can
    reach them."""
    running: list[RunningServer] = []

    def start(options: EngineOptions | None = None, **settings: Any) -> RunningServer:
        running.append(run_server(engine_dir, options or OPTIONS, **settings))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def server(engine_dir: Path) -> Iterator[RunningServer]:
    """A server as it is deployed, with its engine in a separate process."""
    with EngineProcess(EngineSource(engine_dir, "cpu", OPTIONS)) as process:
        process.wait_until_loaded()
        running = serve(load_processor(engine_dir, "cpu", OPTIONS), process)
        yield running
        running.stop()


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """The URL of a collector, and the bodies of the requests that it has received."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{site.server_port}", bodies
        site.shutdown()
        thread.join()


def run_server(
    engine_dir: Path,
    options: EngineOptions,
    tracing: Tracing | None = None,
    gen_ai_metrics: GenAiMetrics | None = None,
    **settings: Any,
) -> RunningServer:
    engine = load_bare_engine(engine_dir, "cpu", options)
    processor = load_processor(engine_dir, "cpu", options)
    return serve(processor, LocalEngine(engine), tracing, gen_ai_metrics, **settings)


def serve(
    processor: Processor,
    process: EngineProcess,
    tracing: Tracing | None = None,
    gen_ai_metrics: GenAiMetrics | None = None,
    **settings: Any,
) -> RunningServer:
    config = ServerConfig(**{"model_name": MODEL, **settings})
    app = create_app(processor, process, config, tracing, gen_ai_metrics)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = Server(uvicorn_config(app), app.state.service)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    with contextlib.suppress(httpx.HTTPError):
        httpx.get(f"{url}/health")
    return RunningServer(url, app.state.service, server, thread)
