"""Limits and names of a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dpn_rt.errors import ConfigError
from dpn_rt.model.reduction.spec import Spec
from dpn_rt.server.connections import ConnectionLimits
from dpn_rt.server.cors import CorsPolicy
from dpn_rt.server.hosts import AllowedHosts
from dpn_rt.server.media.policy import MediaPolicy


@dataclass(frozen=True)
class ServerConfig:
    """Limits and names of one server.

    Raises:
        ConfigError: a limit is out of range or contradicts another.
    """

    model_name: str
    """The model's name: in requests and in /v1/models."""
    api_key: str | None = None
    """Required as a bearer token on every path but /health; None: not required."""
    host: str = "127.0.0.1"
    """Address that the server listens on."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may have as their host, `*` for all. Empty: all with a key, else those of `host`."""
    max_queued_requests: int = 256
    """Answers that may wait for their first step, `n` for each prompt; beyond that requests are refused with 429."""
    max_queued_tokens: int = 262_144
    """Tokens that the waiting prompts and their answers may need, estimated before anything is decoded."""
    max_body_bytes: int = 32 * 2**20
    max_held_body_bytes: int | None = None
    """For the bodies of all unanswered requests; a request that would exceed it is refused with 429. Default: 1 GiB, or
    `max_body_bytes` if that is larger."""
    processed_image_bytes: int = 2**26
    """For the pixels of images that came before, so that they are not decoded again; 0 keeps none."""
    workers: int = 2
    """Threads that parse large bodies, decode images and tokenise text."""
    allow_client_priority: bool = False
    """Whether requests may have a `priority`: a client could put its own before everyone else's."""
    stall_timeout: float = 30.0
    """Seconds; /health fails while a step takes longer."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests get when the server is told to stop; then they are aborted."""
    reduce: Spec | Sequence[Spec] | None = None
    """SPECs that the engine was loaded with, the default first; None: its own."""
    media: MediaPolicy = field(default_factory=MediaPolicy)
    cors: CorsPolicy = field(default_factory=CorsPolicy)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)

    @property
    def held_body_bytes(self) -> int:
        """`max_held_body_bytes`, or its default."""
        return self.max_held_body_bytes or max(2**30, self.max_body_bytes)

    @property
    def hosts(self) -> AllowedHosts:
        """`allowed_hosts`, or its default."""
        if self.allowed_hosts:
            return AllowedHosts.of(self.allowed_hosts)
        return AllowedHosts.of_address(self.host) if self.api_key is None else AllowedHosts.of("*")

    def __post_init__(self) -> None:
        for name in ("max_queued_requests", "max_queued_tokens", "max_body_bytes", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.max_held_body_bytes is not None and self.max_held_body_bytes < self.max_body_bytes:
            raise ConfigError(
                f"max_held_body_bytes={self.max_held_body_bytes}: expected at least one body, {self.max_body_bytes}"
            )
        if self.processed_image_bytes < 0:
            raise ConfigError(f"processed_image_bytes={self.processed_image_bytes}: expected at least 0")
        for name in ("stall_timeout", "shutdown_timeout"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 0 seconds or more")
        if self.api_key is not None:
            check_api_key(self.api_key, "api_key")
        _ = self.hosts  # raises if a name is none


def check_api_key(key: str, name: str) -> None:
    """Checks that clients can send a key.

    Args:
        name: of the setting, for the message.

    Raises:
        ConfigError: it is empty, which is easily taken for no key at all, or no header could hold it.
    """
    if not key.strip():
        raise ConfigError(f"{name} is empty: expected a secret, or {name} left out to serve without a key")
    if key != key.strip() or not key.isprintable():
        raise ConfigError(
            f"{name} begins or ends with white space or has control characters, which no Authorization header keeps: "
            "expected a secret without them"
        )
