"""Limits and names of a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dpn_rt.errors import ConfigError
from dpn_rt.model.reduction.spec import Spec
from dpn_rt.prompts.prompt import MAX_IMAGES
from dpn_rt.server.cors import CorsPolicy
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
    max_queued_requests: int = 256
    """Prompts that may wait for their first step; a request beyond that is refused with 429."""
    max_queued_tokens: int = 262_144
    """Tokens that the waiting prompts and their answers may need, estimated before anything is decoded."""
    max_body_bytes: int = 32 * 2**20
    max_held_body_bytes: int | None = None
    """For the bodies of all unanswered requests; a request that would exceed it is refused with 429. Default: 1 GiB, or
    `max_body_bytes` if that is larger."""
    max_images: int = MAX_IMAGES
    """Of one request, checked before any of them is loaded."""
    processed_image_bytes: int = 2**26
    """For the pixels of images that came before, so that they are not decoded again; 0 keeps none."""
    workers: int = 2
    """Threads that parse large bodies, decode images and tokenise text."""
    stall_timeout: float = 30.0
    """Seconds; /health fails while a step takes longer."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests get when the server is told to stop; then they are aborted."""
    reduce: Spec | Sequence[Spec] | None = None
    """SPECs that the engine was loaded with, the default first; None: its own."""
    media: MediaPolicy = field(default_factory=MediaPolicy)
    cors: CorsPolicy = field(default_factory=CorsPolicy)

    @property
    def held_body_bytes(self) -> int:
        """`max_held_body_bytes`, or its default."""
        return self.max_held_body_bytes or max(2**30, self.max_body_bytes)

    def __post_init__(self) -> None:
        for name in ("max_queued_requests", "max_queued_tokens", "max_body_bytes", "max_images", "workers"):
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
        if self.api_key == "":
            raise ConfigError("api_key is empty: expected a secret, or none at all")
