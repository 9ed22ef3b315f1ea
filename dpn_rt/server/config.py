"""What the server allows."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpn_rt.errors import ConfigError
from dpn_rt.server.media.policy import MediaPolicy


@dataclass(frozen=True)
class ServerConfig:
    """Limits and names of one server.

    Raises:
        ConfigError: a limit that cannot be.
    """

    model_name: str
    """What `model` of a request must be, and what /v1/models lists."""
    api_key: str | None = None
    """Asked for as a bearer token on every path but /health; None: nobody is asked."""
    max_queued_requests: int = 256
    """Requests that wait for their first step; the next one is refused with 429."""
    max_queued_tokens: int = 262_144
    """Tokens that those may need, prompt and answer, estimated before anything is decoded."""
    max_body_bytes: int = 32 * 2**20
    max_held_body_bytes: int | None = None
    """Of the bodies of all requests that have not been answered; what would go beyond is refused with 429. Default:
    1 GiB, or one body if that may be larger."""
    max_images: int = 1
    """Per request; the models take one."""
    picture_bytes: int = 2**26
    """Of pixels of images that came before, so that they are not decoded again; 0: none are kept."""
    workers: int = 2
    """Threads that read requests, images and text beside the engine's own."""
    stall_timeout: float = 30.0
    """/health fails when a step takes longer; seconds."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests get to end when the server is told to stop."""
    media: MediaPolicy = field(default_factory=MediaPolicy)

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
        if self.picture_bytes < 0:
            raise ConfigError(f"picture_bytes={self.picture_bytes}: expected at least 0")
        for name in ("stall_timeout", "shutdown_timeout"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 0 seconds or more")
        if self.api_key == "":
            raise ConfigError("api_key is empty: expected a secret, or none at all")
