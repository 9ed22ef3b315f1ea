"""Serve an engine by several replicas (Ray Serve): `python -m dpn_rt.serve_ray --engine DIR --replicas N`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from dpn_rt import serve as single
from dpn_rt.errors import ConfigError, DpnError, EngineError
from dpn_rt.schema.packages import load_ray
from dpn_rt.server.tls import check_tls
from dpn_rt.terminal import check_text, escape_output

if TYPE_CHECKING:
    from dpn_rt.ray_serve.options import Autoscaling, ServiceOptions

APPLICATION = "dpn_rt"
"""Its name in Ray Serve."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    escape_output()
    options = parser().parse_args(arguments)
    try:
        check_text(options)
        check_tls(options.ssl_certfile, options.ssl_keyfile)
        _serve(options)
    except DpnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the command: those of `python -m dpn_rt.serve`, and how many replicas there are, and where."""
    parser = argparse.ArgumentParser(
        prog="python -m dpn_rt.serve_ray",
        description="Serve an engine over HTTP by several replicas on a Ray cluster, or on this machine alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[single.parser()],
        conflict_handler="resolve",
    )
    add = parser.add_argument_group("replicas").add_argument
    add("--replicas", type=int, default=1, metavar="N", help="replicas, where there is no --max-replicas")
    add("--min-replicas", type=int, default=1, metavar="N", help="replicas that are always there, with --max-replicas")
    add("--max-replicas", type=int, metavar="N", help="add and remove replicas by load, up to so many")
    add(
        "--target-ongoing-requests",
        type=float,
        metavar="X",
        help="requests of a replica, aimed at; default: half of its capacity",
    )
    add(
        "--upscale-delay",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds of more load until replicas are added",
    )
    add(
        "--downscale-delay",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds of less load until some are removed",
    )
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

    from dpn_rt.ray_serve.options import ServiceOptions
    from dpn_rt.server.body_errors import describe

    for name in ("otlp_traces_endpoint", "otlp_metrics_endpoint"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: expected none, replicas on Ray send no telemetry yet")
    if not 0 < options.port < 2**16:
        raise ConfigError(f"--port {options.port}: expected 1 to 65535")
    try:
        return ServiceOptions(
            engine=options.engine.resolve(),
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
        place, message = describe(error)
        raise ConfigError(f"--{(place or '').replace('_', '-')}: {message}") from None


def _autoscaling(options: argparse.Namespace) -> Autoscaling | None:
    from dpn_rt.ray_serve.options import Autoscaling

    if options.max_replicas is None:
        return None
    return Autoscaling(
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        target_ongoing_requests=options.target_ongoing_requests,
        upscale_delay_s=options.upscale_delay,
        downscale_delay_s=options.downscale_delay,
    )


def _serve(options: argparse.Namespace) -> None:
    ray, serve = (load_ray(name, "python -m dpn_rt.serve_ray") for name in ("ray", "ray.serve"))
    from dpn_rt.format.engine_dir import EngineDir
    from dpn_rt.ray_serve.app import build

    service = service_options(options)
    EngineDir.open(service.engine, verify=False)  # told here: replicas would be started again and again
    application = build(service)
    _connect(ray, options)
    try:
        _check_cpus(ray, service)
        serve.start(http_options=_http_options(options))
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise EngineError("the replicas cannot be started; the lines above say why") from error
        print(f"serving {service.server.model_name} on port {options.port}; Ctrl-C ends it", flush=True)
        _wait_for_signal()
        serve.delete(APPLICATION)  # waits for the answers of requests that have been accepted
        if not _joins_cluster(options):
            serve.shutdown()
    finally:
        ray.shutdown()


def _connect(ray: ModuleType, options: argparse.Namespace) -> None:
    """Joins a cluster, or starts one on this machine."""
    if not _joins_cluster(options):
        ray.init("local", include_dashboard=False, _temp_dir=_temp_dir(options))
        return
    try:
        ray.init(options.ray_address)
    except (ConnectionError, ValueError) as error:
        address = options.ray_address or f"(RAY_ADDRESS) {os.environ['RAY_ADDRESS']}"
        raise ConfigError(f"--ray-address {address}: no Ray cluster can be reached there") from error


def _joins_cluster(options: argparse.Namespace) -> bool:
    return options.ray_address is not None or "RAY_ADDRESS" in os.environ


def _temp_dir(options: argparse.Namespace) -> str | None:
    return None if options.ray_temp_dir is None else str(options.ray_temp_dir.resolve())


def _check_cpus(ray: ModuleType, service: ServiceOptions) -> None:
    """Replicas for which there is no room would be waited for without an end.

    Raises:
        ConfigError: the replicas that are always there need more cores than the cluster has.
    """
    count = service.replicas if service.autoscaling is None else service.autoscaling.min_replicas
    needed, there = count * service.cpus_per_replica, ray.cluster_resources().get("CPU", 0.0)
    if needed > there:
        raise ConfigError(
            f"{count} replicas with --cpus-per-replica {service.cpus_per_replica:g} need {needed:g} cores: expected at "
            f"most {there:g}, which the cluster has"
        )


def _http_options(options: argparse.Namespace) -> dict[str, Any]:
    files = {"ssl_certfile": options.ssl_certfile, "ssl_keyfile": options.ssl_keyfile}
    tls = {name: str(path) for name, path in files.items() if path is not None}
    return {"host": options.host, "port": options.port, **tls}


def _wait_for_signal() -> None:
    """Returns at the first SIGTERM or SIGINT. A second one ends the process at once."""
    has_come = threading.Event()

    def come(number: int, frame: FrameType | None) -> None:
        has_come.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, come)
    has_come.wait()


if __name__ == "__main__":
    sys.exit(main())
