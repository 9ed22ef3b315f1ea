"""Serve an engine by several replicas (Ray Serve): `python -m dpn_rt.serve_ray --engine DIR --replicas N`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from dpn_rt import serve as single
from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.ray_cluster import RayCluster, check_room, own_message
from dpn_rt.schema.files import real_path
from dpn_rt.schema.packages import load_ray
from dpn_rt.terminal import ending_signals, escape_output

if TYPE_CHECKING:
    from dpn_rt.ray_serve.options import Autoscaling, ServiceOptions

APPLICATION = "dpn_rt"
"""Its name in Ray Serve."""
SECONDS_TO_REFUSE = 5.0
"""For the ingress to end requests whose time is over."""
COMMAND = "python -m dpn_rt.serve_ray"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    escape_output()
    return single.run(parser().parse_args(arguments), _serve)


def parser() -> argparse.ArgumentParser:
    """The options of the command: those of `python -m dpn_rt.serve`, and how many replicas there are, and where."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Serve an engine over HTTP by several replicas on a Ray cluster, or on this machine alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[single.parser()],
        conflict_handler="resolve",
    )
    add = parser.add_argument_group("replicas").add_argument
    add("--replicas", type=int, default=1, metavar="N", help="replicas, where there is no --max-replicas")
    add("--min-replicas", type=int, metavar="N", help="replicas that are always there, with --max-replicas; default: 1")
    add("--max-replicas", type=int, metavar="N", help="add and remove replicas by load, up to so many")
    add(
        "--target-ongoing-requests",
        type=float,
        metavar="X",
        help="requests of a replica, aimed at, with --max-replicas; default: half of its capacity",
    )
    add("--upscale-delay", type=float, metavar="S", help="seconds of more load until replicas are added; default: 10")
    add("--downscale-delay", type=float, metavar="S", help="seconds of less load until some are removed; default: 300")
    add("--capacity", type=int, metavar="N", help="requests of a replica at a time; default: --max-num-seqs")
    add("--cpus-per-replica", type=float, default=1.0, metavar="X", help="cores, and threads, of a replica")
    add("--gpus-per-replica", type=float, default=0.0, metavar="X", help="GPUs of a replica")
    add("--ingress-replicas", type=int, default=1, metavar="N", help="actors that check and route requests")
    add("--health-check-period", type=float, default=10.0, metavar="S", help="seconds between two health checks")
    add(
        "--ray-address",
        metavar="ADDRESS",
        help="running cluster; default: $RAY_ADDRESS, or a new one here",
    )
    add("--ray-temp-dir", type=Path, metavar="DIR", help="where a new cluster keeps its files; default: /tmp/ray")
    return parser


def service_options(options: argparse.Namespace) -> ServiceOptions:
    """What the command line says of the service.

    Raises:
        ConfigError: a value is wrong.
    """
    from pydantic import ValidationError

    from dpn_rt.ray_serve.option_errors import told_of_command
    from dpn_rt.ray_serve.options import ServiceOptions

    for name in ("otlp_traces_endpoint", "otlp_metrics_endpoint"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: expected none, replicas on Ray send no telemetry yet")
    if not 0 < options.port < 2**16:
        raise ConfigError(f"--port {options.port}: expected 1 to 65535")
    try:
        return ServiceOptions(
            engine=real_path(options.engine),
            device=options.device,
            verify=not options.skip_verify,
            engine_options=single.engine_options(options),
            server=single.server_config(options),
            replicas=options.replicas,
            autoscaling=_autoscaling(options),
            capacity=options.capacity,
            cpus_per_replica=options.cpus_per_replica,
            gpus_per_replica=options.gpus_per_replica,
            ingress_replicas=options.ingress_replicas,
            health_check_period=options.health_check_period,
            log_level=options.log_level,
            log_json=options.log_json,
        )
    except ValidationError as error:
        raise ConfigError(told_of_command(error)) from None


def _autoscaling(options: argparse.Namespace) -> Autoscaling | None:
    """None without `--max-replicas`.

    Raises:
        ConfigError: an option would do nothing without it.
    """
    from dpn_rt.ray_serve.options import Autoscaling

    named = {
        "--min-replicas": ("min_replicas", options.min_replicas),
        "--target-ongoing-requests": ("target_ongoing_requests", options.target_ongoing_requests),
        "--upscale-delay": ("upscale_delay_s", options.upscale_delay),
        "--downscale-delay": ("downscale_delay_s", options.downscale_delay),
    }
    given = {option: field for option, field in named.items() if field[1] is not None}
    if options.max_replicas is not None:
        return Autoscaling(max_replicas=options.max_replicas, **dict(given.values()))
    for option, (_, value) in given.items():
        raise ConfigError(f"{option} {value:g}: expected --max-replicas as well")
    return None


def _serve(options: argparse.Namespace) -> None:
    single.check_packages()  # Ray Serve needs them as well
    serve = load_ray("ray.serve", COMMAND)
    from dpn_rt.engine.loader import load_processor
    from dpn_rt.ray_serve import proxy
    from dpn_rt.ray_serve.app import build

    service = service_options(options)
    cluster = RayCluster(options.ray_address, options.ray_temp_dir)
    if not cluster.runs_already:
        single.check_address(options)
        proxy.use_in(os.environ)
    # What is wrong with the engine or a limit is told here: replicas would be started again and again.
    load_processor(service.engine, service.device, service.engine_options, verify=False)
    application = build(service)
    with cluster.connected(COMMAND) as ray:
        count = service.replicas if service.autoscaling is None else service.autoscaling.min_replicas
        cpus, gpus = service.cpus_per_replica, service.gpus_per_replica
        asked = (f"--cpus-per-replica {cpus:g}", cpus), (f"--gpus-per-replica {gpus:g}", gpus)
        check_room(ray, f"{count} replicas", count, *asked)
        _start(serve, application, options)
        print(f"serving {service.server.model_name} on port {options.port}; Ctrl-C ends it", flush=True)
        _wait_for_signal()
        _drain(serve, service.server.shutdown_timeout)
        serve.delete(APPLICATION)
        if not cluster.runs_already:
            serve.shutdown()


def _start(serve: Any, application: Any, options: argparse.Namespace) -> None:
    """Starts proxies and replicas.

    Raises:
        EngineError: they cannot be started, with what a replica has said.
    """
    try:
        serve.start(http_options=_http_options(options))
    except RuntimeError as error:
        raise EngineError(
            f"--host {options.host} --port {options.port}: Ray Serve cannot listen there; the lines above say why"
        ) from error
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        told = own_message(error) or "the lines above say why"
        raise EngineError(f"the replicas cannot be started: {told}") from error


def _drain(serve: Any, seconds: float) -> None:
    """Waits for the answers of requests that have been accepted, so many seconds; new ones get 503 meanwhile."""
    from dpn_rt.ray_serve.app import INGRESS

    ingresses = serve.get_deployment_handle(INGRESS, APPLICATION)
    limit = min(seconds + SECONDS_TO_REFUSE, threading.TIMEOUT_MAX)
    with suppress(TimeoutError):  # then they end without
        ingresses.broadcast("drain").results(timeout_s=limit, return_exceptions=True)


def _http_options(options: argparse.Namespace) -> dict[str, Any]:
    files = {"ssl_certfile": options.ssl_certfile, "ssl_keyfile": options.ssl_keyfile}
    tls = {name: str(path) for name, path in files.items() if path is not None}
    return {"host": options.host, "port": options.port, **tls}


def _wait_for_signal() -> None:
    """Returns at the first signal of `ending_signals`. A second one ends the process at once."""
    has_come, signals = threading.Event(), ending_signals()

    def come(number: int, frame: FrameType | None) -> None:
        has_come.set()
        for each in signals:
            signal.signal(each, signal.SIG_DFL)

    for number in signals:
        signal.signal(number, come)
    has_come.wait()


if __name__ == "__main__":
    sys.exit(main())
