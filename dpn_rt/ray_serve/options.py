"""What a service of several replicas is: the arguments of `app.build`, and so of a Serve config file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dpn_rt.errors import ConfigError
from dpn_rt.ray_cluster import copies_weights
from dpn_rt.schema.files import real_path
from dpn_rt.schema.text import is_text
from dpn_rt.serve import ENGINE_DEFAULTS
from dpn_rt.server.config import ServerConfig
from dpn_rt.settings import EngineOptions

_OF_ENGINE = {"processed_image_bytes": "reuse_bytes", "reduce": "reduce"}
"""Fields of `ServerConfig`, and the engine's options that they follow."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
"""Ray takes no other numbers."""


class Autoscaling(BaseModel):
    """How many replicas there are, by the requests that wait or run in each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)]
    target_ongoing_requests: Annotated[Finite, Field(gt=0)] | None = None
    """Requests of one replica, waiting ones included, that are aimed at; None: half of its `capacity`."""
    upscale_delay_s: Annotated[Finite, Field(ge=0)] = 10.0
    """Seconds of higher load before replicas are added."""
    downscale_delay_s: Annotated[Finite, Field(ge=0)] = 300.0
    """Seconds of lower load before replicas are removed."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas}: expected at least min_replicas={self.min_replicas}")
        return self


class ServiceOptions(BaseModel):
    """A service: an engine, how each replica runs it, and how many replicas there are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Path
    """Directory of the engine, the same on all machines."""
    device: str = "auto"
    verify: bool = True
    """Compare the files' sha256 with the engine's record before use."""
    engine_options: EngineOptions
    """As of `python -m dpn_rt.serve`, whose defaults stand for the fields that a config file leaves out."""
    server: ServerConfig
    """Limits and names, with the same defaults; `model_name` is the directory's."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Without `autoscaling`."""
    autoscaling: Autoscaling | None = None
    capacity: Annotated[int, Field(ge=1)] | None = None
    """Requests that a replica has at a time; beyond that they go to others or wait at the ingress. None:
    `max_num_seqs`, so that all of them run at the same time."""
    cpus_per_replica: Annotated[Finite, Field(ge=0)] = 1.0
    """Cores that Ray reserves for a replica, which has as many threads."""
    gpus_per_replica: Annotated[Finite, Field(ge=0)] = 0.0
    ingress_replicas: Annotated[int, Field(ge=1)] = 1
    """Actors between Serve's proxies and the replicas; they check and route requests, and compute nothing."""
    health_check_period: Annotated[Finite, Field(gt=0)] = 10.0
    """Seconds between two questions whether a replica's engine is well; after three bad answers it is replaced."""
    log_level: str = "info"
    log_json: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """What a config file leaves out is as the command has it."""
        if not isinstance(values, dict):
            return values
        limits, server = values.get("engine_options", {}), values.get("server", {})
        if isinstance(limits, dict):
            limits = {**ENGINE_DEFAULTS, **limits}
        if isinstance(server, dict):
            server = {**_server_defaults(values, limits), **server}
        return {**values, "engine_options": limits, "server": server}

    @property
    def options_of_one(self) -> EngineOptions:
        """`engine_options` of a replica, which may be one of several."""
        most = self.replicas if self.autoscaling is None else self.autoscaling.max_replicas
        return replace(self.engine_options, copy_weights=copies_weights(self.engine_options.copy_weights, most))

    @property
    def places(self) -> int:
        """`capacity`, or its default."""
        return self.capacity or self.engine_options.max_num_seqs


def _server_defaults(values: dict[str, Any], limits: Any) -> dict[str, Any]:
    """Of `server`, where the values beside it say them."""
    named = {"model_name": model_name(Path(values["engine"]))} if isinstance(values.get("engine"), str | Path) else {}
    given = vars(limits) if isinstance(limits, EngineOptions) else limits
    known = given if isinstance(given, dict) else {}
    return named | {name: known[option] for name, option in _OF_ENGINE.items() if option in known}


def model_name(engine: Path) -> str:
    """The name of an engine's directory.

    Raises:
        ConfigError: it is not UTF-8.
    """
    name = real_path(engine).name
    if not is_text(name):
        raise ConfigError(f"the engine's directory is {name!r}, not UTF-8: expected a name for the model as well")
    return name
