"""What the server may load for an `image_url`, and the errors of loading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import httpx

from dpn_rt.errors import ConfigError, ImageError


class MediaError(ImageError):
    """The URL of an image is malformed, not allowed, or nothing can be loaded from it (HTTP 400)."""


class MediaTooLargeError(MediaError):
    """An image has more bytes than the server takes (HTTP 413)."""


@dataclass(frozen=True)
class MediaPolicy:
    """What may be loaded, and how much of it.

    Attributes:
        allowed_domains: hosts of http(s) URLs, exact (no subdomains), lower case, international names as `xn--`; empty:
            nothing is fetched over the network. A host is allowed with every port.
        allowed_local_path: `file:` URLs may name files below this folder, after symbolic links; None: no file at all.
            Clients should not be able to write to the folder: they would choose what is in it.
        max_image_bytes: of one image file, before its pixels are decoded.
        timeout: seconds for one image, including name lookup, redirects and body.
        max_redirects: for one image.

    Raises:
        ConfigError: a value would allow nothing, or something else than it seems to.
    """

    allowed_domains: frozenset[str] = frozenset()
    allowed_local_path: Path | None = None
    max_image_bytes: int = 20 * 2**20
    timeout: float = 10.0
    max_redirects: int = 3

    def __post_init__(self) -> None:
        for domain in sorted(self.allowed_domains):
            if not _is_host_name(domain):
                raise ConfigError(
                    f"allowed_domains: {domain!r} would match no URL, expected a lower-case host name without scheme, "
                    "port, path or wildcard, such as 'images.example.com'"
                )
        if self.allowed_local_path is not None and not self.allowed_local_path.is_dir():
            raise ConfigError(f"allowed_local_path: {str(self.allowed_local_path)!r} is not a folder")
        if self.max_image_bytes < 1:
            raise ConfigError(f"max_image_bytes: {self.max_image_bytes}, expected at least 1")
        if not self.timeout > 0:
            raise ConfigError(f"timeout: {self.timeout}, expected more than 0 seconds")
        if self.max_redirects < 0:
            raise ConfigError(f"max_redirects: {self.max_redirects}, expected at least 0")


def _is_host_name(domain: str) -> bool:
    try:
        return bool(domain) and "*" not in domain and httpx.URL(scheme="http", host=domain).raw_host == domain.encode()
    except (httpx.InvalidURL, UnicodeError):
        return False
