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
from dpn_rt.server.config import ServerConfig
from dpn_rt.settings import EngineOptions


class Autoscaling(BaseModel):
    """How many replicas there are, by the requests that wait or run in each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)]
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = None
    """Requests of one replica, waiting ones included, that are aimed at; None: half of its `capacity`."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    """Seconds of higher load before replicas are added."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0
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
    engine_options: EngineOptions = Field(
        default_factory=lambda: EngineOptions(reuse_bytes=2**28, max_chunk_tokens=128)
    )
    """As of `python -m dpn_rt.serve`, whose defaults these are."""
    server: ServerConfig
    """Limits and names. In a config file it may be left out, and so may `model_name`: the directory's."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Without `autoscaling`."""
    autoscaling: Autoscaling | None = None
    capacity: Annotated[int, Field(ge=1)] | None = None
    """Requests that a replica has at a time; beyond that they go to others or wait at the ingress. None:
    `max_num_seqs`, so that all of them run at the same time."""
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1.0
    """Cores that Ray reserves for a replica, which has as many threads."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    ingress_replicas: Annotated[int, Field(ge=1)] = 1
    """Actors between Serve's proxies and the replicas; they check and route requests, and compute nothing."""
    health_check_period: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two questions whether a replica's engine is well; after three bad answers it is replaced."""
    log_level: str = "info"
    log_json: bool = False

    @model_validator(mode="before")
    @classmethod
    def _name_model(cls, values: Any) -> Any:
        """Fills the model's name in, where a config file has none."""
        server = values.get("server", {}) if isinstance(values, dict) else None
        if not isinstance(server, dict) or "engine" not in values or "model_name" in server:
            return values
        return {**values, "server": {"model_name": model_name(Path(values["engine"])), **server}}

    @property
    def options_of_one(self) -> EngineOptions:
        """`engine_options` of a replica, which may be one of several."""
        most = self.replicas if self.autoscaling is None else self.autoscaling.max_replicas
        return replace(self.engine_options, copy_weights=copies_weights(self.engine_options.copy_weights, most))

    @property
    def places(self) -> int:
        """`capacity`, or its default."""
        return self.capacity or self.engine_options.max_num_seqs


def model_name(engine: Path) -> str:
    """The name of an engine's directory.

    Raises:
        ConfigError: it is not UTF-8.
    """
    name = real_path(engine).name
    if not is_text(name):
        raise ConfigError(f"the engine's directory is {name!r}, not UTF-8: expected a name for the model as well")
    return name
