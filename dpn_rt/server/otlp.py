"""What exporters of OpenTelemetry have in common: the packages, the endpoint, the name of the server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from dpn_rt.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

log = logging.getLogger(__name__)
LAST_EXPORT = 2.0
"""Seconds for collectors to take the last spans and metrics. One that cannot be reached would be tried for longer."""
Kind = Literal["traces", "metrics"]


def check_endpoint(endpoint: str, kind: Kind) -> None:
    """Refuses a collector that nothing can be sent to.

    Args:
        endpoint: URL of the collector, OTLP over HTTP.
        kind: what is sent.

    Raises:
        ConfigError: the packages are missing, or the endpoint is no URL.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"otlp endpoint {endpoint!r}: expected a URL such as http://localhost:4318/v1/{kind}")
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.instrumentation.fastapi
        import opentelemetry.sdk.resources  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{kind} need the package {error.name}: in the repository, pip install --no-build-isolation -e '.[otel]'"
        ) from error


def named_resource(endpoint: str, kind: Kind, service_name: str) -> Resource:
    """The resource of a provider that sends to a collector.

    Args:
        endpoint: see `check_endpoint`.
        kind: what is sent.
        service_name: of this server; the variable OTEL_SERVICE_NAME overrides it.

    Raises:
        ConfigError: as `check_endpoint`.
    """
    check_endpoint(endpoint, kind)
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    return Resource.create({"service.name": service_name}).merge(OTELResourceDetector().detect())


def close_in_time(closes: Sequence[Callable[[], object]], seconds: float = LAST_EXPORT) -> None:
    """Sends what exporters still have, all at once, and goes on without those that take too long."""
    threads = [threading.Thread(target=close, name="dpn_rt-otlp-close", daemon=True) for close in closes]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        log.warning("a collector of OpenTelemetry took nothing for %g s: the last spans or metrics are lost", seconds)
