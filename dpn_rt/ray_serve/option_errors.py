"""What is wrong with the options of a service, in words of our own: those of pydantic name its types."""

from __future__ import annotations

import inspect

from pydantic import ValidationError

from dpn_rt.ray_serve.options import Autoscaling, ServiceOptions
from dpn_rt.schema.text import few, shown
from dpn_rt.server.config import ServerConfig
from dpn_rt.server.connections import ConnectionLimits
from dpn_rt.server.cors import CorsPolicy
from dpn_rt.server.media.policy import MediaPolicy
from dpn_rt.settings import EngineOptions

_GROUPS = {
    "": ServiceOptions,
    "autoscaling": Autoscaling,
    "engine_options": EngineOptions,
    "server": ServerConfig,
    "server.connections": ConnectionLimits,
    "server.cors": CorsPolicy,
    "server.media": MediaPolicy,
}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def told_of_file(error: ValidationError) -> str:
    """The message for a config file: `server.workers='x': expected a valid integer`."""
    place, given, fault = _first(error)
    return f"{place}{given and f'={given}'}: {fault}" if place else fault


def told_of_command(error: ValidationError) -> str:
    """The message for a command line: `--replicas 0: expected at least 1`."""
    place, given, fault = _first(error)
    if not given:  # of several options, which it names
        return fault
    option = place.rpartition(".")[2].removesuffix("_s").replace("_", "-")
    return f"--{option} {given}: {fault}"


def _first(error: ValidationError) -> tuple[str, str, str]:
    """The place of a field that is wrong, its value, and what would be right. The value is empty where the fault is not
    of one field alone."""
    first = max(error.errors(include_url=False), key=lambda item: len(item["loc"]))
    place = ".".join(map(str, first["loc"]))
    if first["type"] in _UNKNOWN:
        group = _GROUPS.get(place.rpartition(".")[0])
        known = few(list(inspect.signature(group).parameters)) if group is not None else "one of the documentation's"
        return place, "", f"unknown, expected one of {known}"
    if first["type"] == "missing":
        return place, "", "missing, expected it"
    if first["type"] == "value_error":  # of our own checks
        return place, "", str(first["ctx"]["error"])
    value = "..." if place == "server.api_key" else shown(first["input"])
    return (
        place,
        value,
        first["msg"].replace("Input should be", "expected").replace("greater than or equal to", "at least"),
    )
