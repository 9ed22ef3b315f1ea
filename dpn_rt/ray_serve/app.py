"""The application of Ray Serve: an ingress in front of replicas. A Serve config file names `build`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from dpn_rt.errors import ConfigError
from dpn_rt.ray_serve.ingress import Ingress
from dpn_rt.ray_serve.option_errors import told_of_file
from dpn_rt.ray_serve.options import ServiceOptions
from dpn_rt.ray_serve.replica import Replica
from dpn_rt.ray_serve.routing import SPARE_PLACES, ImageAffinityRouter
from dpn_rt.serve import API_KEY_VARIABLE
from dpn_rt.server.config import check_api_key

INGRESS, REPLICA = "Ingress", "Replica"
"""Names of the deployments."""
SECONDS_TO_STOP = 10.0
"""For a replica after its last request."""
MOST_SECONDS_TO_WAIT = 0.1
"""Before a request looks for a free replica again, where all were full."""


def build(options: ServiceOptions | Mapping[str, Any]) -> Application:
    """The application, for `serve.run` or `import_path: dpn_rt.ray_serve.app:build`.

    Args:
        options: or the `args` of a Serve config file, which have the same names. Without an API key among them it is
            taken from the environment variable DPN_RT_API_KEY.

    Raises:
        ConfigError: an argument is unknown or wrong.
    """
    checked = options if isinstance(options, ServiceOptions) else _checked(options)
    if checked.server.api_key is None and (key := os.environ.get(API_KEY_VARIABLE)) is not None:
        check_api_key(key, API_KEY_VARIABLE)
        checked = checked.model_copy(update={"server": replace(checked.server, api_key=key)})
    return _ingress(checked).bind(_replicas(checked).bind(checked), checked)


def _replicas(options: ServiceOptions) -> serve.Deployment:
    routing: dict[str, Any] = {
        "request_router_class": ImageAffinityRouter,
        "request_router_kwargs": {"capacity": options.places},
        "max_backoff_s": MOST_SECONDS_TO_WAIT,
    }
    return serve.deployment(
        name=REPLICA,
        **_scale(options),
        max_ongoing_requests=options.places + SPARE_PLACES,
        max_queued_requests=options.server.max_queued_requests,
        ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica},
        request_router_config=RequestRouterConfig(**routing),
        **_life(options),
    )(Replica)


def _scale(options: ServiceOptions) -> dict[str, Any]:
    scaling = options.autoscaling
    if scaling is None:
        return {"num_replicas": options.replicas}
    target = scaling.target_ongoing_requests or max(1.0, options.places / 2)
    return {"autoscaling_config": {**scaling.model_dump(), "target_ongoing_requests": target}}


def _life(options: ServiceOptions) -> dict[str, Any]:
    return {
        "health_check_period_s": options.health_check_period,
        "health_check_timeout_s": options.server.stall_timeout + options.health_check_period,
        "graceful_shutdown_timeout_s": options.server.shutdown_timeout + SECONDS_TO_STOP,
        "graceful_shutdown_wait_loop_s": 0.2,
    }


def _ingress(options: ServiceOptions) -> serve.Deployment:
    return serve.deployment(
        name=INGRESS,
        num_replicas=options.ingress_replicas,
        max_ongoing_requests=options.server.connections.max_connections,
        ray_actor_options={"num_cpus": 0},
        **_life(options),
    )(Ingress)


def _checked(values: Mapping[str, Any]) -> ServiceOptions:
    try:
        return ServiceOptions.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(told_of_file(error)) from None
