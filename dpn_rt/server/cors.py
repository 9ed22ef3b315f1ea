"""Which web pages of other origins may use the server (CORS), with vLLM's names and defaults of the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from dpn_rt.errors import ConfigError


@dataclass(frozen=True)
class CorsPolicy:
    """What a browser is told about requests from pages of other origins.

    Raises:
        ConfigError: an origin would match no page, or another setting has no effect without origins.
    """

    allowed_origins: tuple[str, ...] = ()
    """As browsers send them, such as https://app.example.com, or null (local files), or * (all); empty: none."""
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    """Cookies and HTTP authentication of browsers. The API key is none of them: pages send it in a header."""

    def __post_init__(self) -> None:
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and not _is_origin(origin):
                raise ConfigError(
                    f"allowed_origins: {origin!r} would match no page, expected a scheme, a host and a port if it is "
                    "not the scheme's own, such as 'https://app.example.com', or '*'"
                )
        for name, default in (("allowed_methods", ("*",)), ("allowed_headers", ("*",)), ("allow_credentials", False)):
            if not self.allowed_origins and getattr(self, name) != default:
                raise ConfigError(f"{name}: no effect without allowed origins, expected some as well")

    @property
    def middleware_options(self) -> dict[str, Any]:
        """The arguments of Starlette's `CORSMiddleware`."""
        return {
            "allow_origins": self.allowed_origins,
            "allow_methods": self.allowed_methods,
            "allow_headers": self.allowed_headers,
            "allow_credentials": self.allow_credentials,
        }


def _is_origin(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return bool(url.scheme and url.host) and text == f"{url.scheme}://{url.netloc.decode('ascii')}"
