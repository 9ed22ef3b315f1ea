"""Serve an engine over HTTP: `python -m dpn_rt.serve --engine DIR --host 127.0.0.1 --port 8000`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dpn_rt.errors import ConfigError, StepError
from dpn_rt.memory import not_enough_memory
from dpn_rt.schema.files import real_path
from dpn_rt.schema.text import is_text
from dpn_rt.server.tls import check_tls
from dpn_rt.terminal import check_text, escape_output, exit_status

if TYPE_CHECKING:
    from dpn_rt.server.config import ServerConfig
    from dpn_rt.server.engine_client.process import EngineProcess
    from dpn_rt.settings import EngineOptions

API_KEY_VARIABLE = "DPN_RT_API_KEY"
ENGINE_DEFAULTS: Mapping[str, int] = {"max_chunk_tokens": 128, "reuse_bytes": 2**28, "max_image_pixels": 40_000_000}
"""Where servers have other defaults than `EngineOptions`: clients wait for others' prompts, ask again, and send images
of any size."""

FIELDS: Mapping[str, str] = {
    "processed_image_bytes": "reuse_bytes",
    "allowed_domains": "allowed_media_domains",
    "allowed_local_path": "allowed_local_media_path",
    "timeout": "media_timeout",
}
"""Fields of settings -> options of other names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    escape_output()
    return run(parser().parse_args(arguments), _serve)


def run(options: argparse.Namespace, serve: Callable[[argparse.Namespace], None]) -> int:
    """Checks the options that all servers have, serves, and returns the exit status. An error is told."""

    def checked() -> int:
        check_text(options)
        check_tls(options.ssl_certfile, options.ssl_keyfile)
        with _naming_options(options):
            serve(options)
        return 0

    def address_failed(error: OSError) -> int:
        print(f"error: --host {options.host} --port {options.port}: {error.strerror or error}", file=sys.stderr)
        return 1

    return exit_status(
        checked,
        no_memory=lambda: not_enough_memory(options.engine),
        interrupted=lambda: "interrupted",
        system_error=address_failed,
    )


@contextmanager
def _naming_options(options: argparse.Namespace) -> Iterator[None]:
    """Messages of the settings' classes begin with a field: `max_num_seqs=0: expected ...`. Users know the option,
    `--max-num-seqs 0: expected ...`."""
    try:
        yield
    except ConfigError as error:
        found = re.match("([a-z_]+)(=|: )", str(error))
        name = found and FIELDS.get(found[1], found[1])
        if not found or not hasattr(options, str(name)):
            raise
        sign = " " if found[2] == "=" else found[2]
        raise ConfigError(f"--{name}".replace("_", "-") + sign + str(error)[found.end() :]) from error


def _serve(options: argparse.Namespace) -> None:
    # Imported here: --help and a wrong option should not wait for torch.
    import torch

    check_packages()
    from dpn_rt.engine.loader import load_processor
    from dpn_rt.server.app import create_app
    from dpn_rt.server.engine_client.messages import EngineSource, LogConfig
    from dpn_rt.server.engine_client.process import EngineProcess
    from dpn_rt.server.gen_ai import otlp_metrics
    from dpn_rt.server.http_server import Server, bind, uvicorn_config
    from dpn_rt.server.logs import set_up_logs
    from dpn_rt.server.otlp import check_endpoint
    from dpn_rt.server.tracing import otlp_tracing

    config, limits = server_config(options), engine_options(options)
    set_up_logs(options.log_level, as_json=options.log_json)
    logs = LogConfig(options.log_level, options.log_json)
    source = EngineSource(options.engine, options.device, limits, logs)
    if not 0 <= options.port < 2**16:
        raise ConfigError(f"--port {options.port}: expected 0 to 65535")
    traces, metrics = options.otlp_traces_endpoint, options.otlp_metrics_endpoint
    if traces:
        check_endpoint(traces, "traces")
    if metrics:
        check_endpoint(metrics, "metrics")
    with ExitStack() as stack:
        sockets = bind(options.host, options.port)  # first of all: to load an engine takes longer than to find this out
        for sock in sockets:
            stack.enter_context(sock)
        process = stack.enter_context(EngineProcess(source))  # it loads the weights while the files are verified here
        processor = load_processor(source.path, source.device, limits, verify=not options.skip_verify)
        process.wait_until_loaded()
        tracing = otlp_tracing(traces, config.model_name, "dpn_rt") if traces else None
        gen_ai_metrics = otlp_metrics(metrics, config.model_name, "dpn_rt") if metrics else None
        app = create_app(processor, process, config, tracing, gen_ai_metrics)
        torch.set_num_threads(1)  # images are prepared in parallel, and the cores are for the engine
        # What is loaded by now stays. A full pass of the garbage collector over it would stop every stream.
        gc.collect()
        gc.freeze()
        settings = uvicorn_config(
            app,
            host=options.host,
            port=options.port,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
        )
        server = Server(settings, app.state.service, lambda: _end_by_force(process))
        asyncio.run(server.serve(sockets))
        if server.is_hurried:
            _end_by_force(process)  # to take the interpreter down in order takes a while
        if server.failure is not None:
            raise StepError(f"the engine has stopped: {server.failure}")


def check_packages() -> None:
    """Refuses to go on without the packages of servers.

    Raises:
        ConfigError: one is not installed.
    """
    try:
        from dpn_rt.server import app, gen_ai, http_server, logs, tracing  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("dpn_rt"):
            raise
        raise ConfigError(
            f"the server needs the package {error.name}: in the repository, "
            "pip install --no-build-isolation -e '.[serve]'"
        ) from error


def check_address(options: argparse.Namespace) -> None:
    """Refuses an address that another server listens on, or that is not of this machine.

    Raises:
        OSError: as `http_server.bind`.
    """
    from dpn_rt.server.http_server import bind

    for sock in bind(options.host, options.port):
        sock.close()


def _end_by_force(process: EngineProcess) -> None:
    process.kill()
    os._exit(0)


def server_config(options: argparse.Namespace) -> ServerConfig:
    """What the command line says of the server.

    Raises:
        ConfigError: a value is wrong.
    """
    from dpn_rt.server.config import ServerConfig
    from dpn_rt.server.connections import ConnectionLimits
    from dpn_rt.server.cors import CorsPolicy
    from dpn_rt.server.media.policy import MediaPolicy

    if not options.host.strip():
        raise ConfigError(f"--host {options.host!r}: expected an address of this machine, or 0.0.0.0 for all")
    if options.served_model_name is not None and not options.served_model_name.strip():
        raise ConfigError(f"--served-model-name {options.served_model_name!r}: expected a name")
    model_name = options.served_model_name or real_path(options.engine).name
    if not is_text(model_name):
        raise ConfigError(f"the engine's directory is {model_name!r}, not UTF-8: expected a --served-model-name")
    return ServerConfig(
        model_name=model_name,
        api_key=_api_key(options),
        host=options.host,
        allowed_hosts=_flat(options.allowed_hosts),
        max_queued_requests=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
        max_body_bytes=options.max_body_bytes,
        max_held_body_bytes=options.max_held_body_bytes,
        processed_image_bytes=options.reuse_bytes,
        workers=options.workers,
        allow_client_priority=options.allow_client_priority,
        stall_timeout=options.stall_timeout,
        shutdown_timeout=options.shutdown_timeout,
        reduce=options.reduce,
        media=MediaPolicy(
            allowed_domains=frozenset(options.allowed_media_domains),
            allowed_local_path=options.allowed_local_media_path,
            max_image_bytes=options.max_image_bytes,
            timeout=options.media_timeout,
        ),
        cors=CorsPolicy(
            allowed_origins=_flat(options.allowed_origins),
            allowed_methods=_flat(options.allowed_methods),
            allowed_headers=_flat(options.allowed_headers),
            allow_credentials=options.allow_credentials,
        ),
        connections=ConnectionLimits(max_connections=options.max_connections),
    )


def _api_key(options: argparse.Namespace) -> str | None:
    """None where neither the option nor the variable is given: an empty one is refused, not taken for none."""
    from dpn_rt.server.config import check_api_key

    source, key = "--api-key", options.api_key
    if key is None:
        source, key = API_KEY_VARIABLE, os.environ.get(API_KEY_VARIABLE)
    if key is None:
        return None
    if not is_text(key):
        raise ConfigError(f"{source}: not UTF-8, expected a key in UTF-8")
    check_api_key(key, source)
    return str(key)


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """What the command line says of the engine.

    Raises:
        ConfigError: a value is wrong.
    """
    from dpn_rt.settings import EngineOptions

    if options.max_chunk_tokens < 0:
        raise ConfigError(f"max_chunk_tokens={options.max_chunk_tokens}: expected at least 0, with which none is cut")
    return EngineOptions(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_chunk_tokens=options.max_chunk_tokens or None,
        max_model_len=options.max_model_len,
        kv_cache_bytes=options.kv_cache_bytes,
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_graph_rows=options.max_graph_rows,
        reuse_bytes=options.reuse_bytes,
        copy_weights=options.copy_weights,
        max_image_pixels=options.max_image_pixels,
        limit_mm_per_prompt=options.limit_mm_per_prompt,
        reduce=options.reduce,
        tensor_parallel_size=options.tensor_parallel_size,
    )


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m dpn_rt.serve",
        description="Serve an engine over HTTP, as OpenAI's API.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--engine", type=Path, required=True, metavar="DIR", help="engine directory made by dpn_rt.build")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    add("--port", type=int, default=8000, help="0 takes a free one")
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--served-model-name", metavar="NAME", help="name of the model in requests; default: the directory's")
    add("--api-key", metavar="KEY", help=f"bearer token asked of clients; better in ${API_KEY_VARIABLE}")
    parser.add_argument(
        "--allowed-hosts",
        nargs="+",
        type=_names,
        default=[],
        metavar="NAME",
        help="names by which clients may address the server, * for all; default: with a key all, else those of --host",
    )
    add("--ssl-keyfile", type=Path, metavar="FILE", help="TLS key")
    add("--ssl-certfile", type=Path, metavar="FILE", help="TLS certificate")
    _add_engine_limits(parser)
    _add_server_limits(parser)
    _add_cors(parser)
    parser.set_defaults(**ENGINE_DEFAULTS)
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    add("--log-json", action="store_true", help="log one JSON object per line")
    add("--otlp-traces-endpoint", metavar="URL", help="collector of OpenTelemetry traces, OTLP over HTTP")
    add("--otlp-metrics-endpoint", metavar="URL", help="collector of OpenTelemetry metrics, OTLP over HTTP")
    add("--skip-verify", action="store_true", help="load without comparing the files' sha256")
    return parser


def _add_engine_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-num-seqs", type=int, default=64, metavar="N", help="sequences that run at the same time")
    add("--max-num-batched-tokens", type=int, metavar="N", help="rows of one prefill step")
    add(
        "--reduce",
        nargs="+",
        metavar="SPEC",
        help="training-free reductions that requests may ask for, the first by default; e.g. fastv:k=2,ratio=0.5",
    )
    add("--max-chunk-tokens", type=int, metavar="N", help="part of a prefill between two decodes; 0: all")
    add("--max-model-len", type=int, metavar="N", help="rows of one request, prompt and answer")
    add("--kv-cache-bytes", type=int, metavar="N", help="size of the KV cache")
    add(
        "--copy-weights",
        action=argparse.BooleanOptionalAction,
        help="copy weights into huge pages, or map the file, which processes share; default: by free memory",
    )
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="processes that share the decoder")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="share of a GPU's memory to use at most")
    add("--max-graph-rows", type=int, default=2048, metavar="N", help="largest prefill stage that is a graph on a GPU")
    caches = "memory of each of three caches: prepared images, their rows, and rows of prefixes; 0: no reuse"
    add("--reuse-bytes", type=int, metavar="N", help=caches)


def _add_server_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-queued-requests", type=int, default=256, metavar="N", help="waiting answers before 429")
    add("--max-queued-tokens", type=int, default=262_144, metavar="N", help="waiting tokens before 429")
    add("--max-body-bytes", type=int, default=32 * 2**20, metavar="N", help="bytes of one request")
    add(
        "--max-held-body-bytes",
        type=int,
        metavar="N",
        help="bytes of all unanswered requests before 429; about 1 GiB",
    )
    add("--max-image-bytes", type=int, default=20 * 2**20, metavar="N", help="bytes of one image")
    add("--max-image-pixels", type=int, metavar="N", help="pixels of one image")
    add("--limit-mm-per-prompt", type=_counts, metavar="image=N", help="images of one request; default 16")
    add("--allowed-media-domains", nargs="*", default=[], metavar="HOST", help="hosts that images are fetched from")
    add("--allowed-local-media-path", type=Path, metavar="DIR", help="folder that file: images are read from")
    add("--media-timeout", type=float, default=10.0, metavar="S", help="seconds for one image")
    add("--max-connections", type=int, default=1024, metavar="N", help="requests sent or answered at a time before 503")
    add("--allow-client-priority", action="store_true", help="requests may have a priority other than 0")
    add("--workers", type=int, default=2, metavar="N", help="threads that decode images and text")
    add("--stall-timeout", type=float, default=30.0, metavar="S", help="/health fails when a step takes longer")
    add("--shutdown-timeout", type=float, default=30.0, metavar="S", help="seconds for running requests at the end")


def _add_cors(parser: argparse.ArgumentParser) -> None:
    def add(name: str, default: str | list[str], text: str) -> None:
        parser.add_argument(name, nargs="+", type=_names, default=default, metavar="NAME", help=text)

    add("--allowed-origins", [], "web pages that may use the server, such as https://app.example.com, or * for all")
    add("--allowed-methods", "*", "methods that they may use")
    add("--allowed-headers", "*", "headers that they may send")
    parser.add_argument("--allow-credentials", action="store_true", help="they may send cookies")


def _names(text: str) -> list[str]:
    """A name, or a list of them in JSON, which is how vLLM takes them."""
    if not text.startswith("["):
        return [text]
    try:
        names = json.loads(text)
    except ValueError:
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise argparse.ArgumentTypeError(f"{text!r:.100}: expected a name, or a list of names in JSON")
    return list(names)


def _counts(text: str) -> dict[str, int]:
    """`image=4`, or `{"image": 4}`, the two ways in which vLLM takes it."""
    try:
        if text.startswith("{"):
            return dict(json.loads(text))
        return {name: int(count) for name, _, count in (item.partition("=") for item in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected image=N") from None


def _flat(names: list[list[str] | str]) -> tuple[str, ...]:
    """All names of one option. argparse gives a list per word, and the default without one around it."""
    return tuple(name for each in names for name in ([each] if isinstance(each, str) else each))


if __name__ == "__main__":
    sys.exit(main())
