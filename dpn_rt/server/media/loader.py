"""The `image_url` of a chat message -> the bytes of an image file, where a policy allows it."""

from __future__ import annotations

import asyncio
import ssl
from concurrent.futures import Executor

from dpn_rt.errors import ImageError
from dpn_rt.prompts.data_url import DataUrlTooLargeError, decode_data_url, has_scheme, is_data_url, shorten, stripped
from dpn_rt.server.media.addresses import IsAllowedAddress, Resolve, is_public_address, resolve_host
from dpn_rt.server.media.fetch import MAX_URL_LENGTH, Fetcher
from dpn_rt.server.media.local_file import read_local_file
from dpn_rt.server.media.policy import MediaError, MediaPolicy, MediaTooLargeError

LONG_URL = 2**16
"""Characters. Data of at least this size are decoded in a thread: 20 MB take a tenth of a second."""


class MediaLoader:
    """Loads the images of requests. Used on one event loop.

    Args:
        policy: what may be loaded.
        resolve: looks up the addresses of a host name, once per connection.
        is_allowed_address: whether the server may connect to an address.
        ssl_context: for https; None: that of httpx, which verifies certificates and host names (and reads
            `SSL_CERT_FILE`).
        reader: decodes long data URLs; None: the event loop's own executor.
    """

    def __init__(
        self,
        policy: MediaPolicy,
        *,
        resolve: Resolve = resolve_host,
        is_allowed_address: IsAllowedAddress = is_public_address,
        ssl_context: ssl.SSLContext | None = None,
        reader: Executor | None = None,
    ) -> None:
        self._policy, self._reader = policy, reader
        self._fetcher = Fetcher(policy, resolve, is_allowed_address, ssl_context)

    async def load(self, url: str) -> bytes:
        """The bytes of a `data:`, `http:`, `https:` or `file:` URL. Whether they are an image is not checked.

        White space around a URL is ignored.

        Raises:
            MediaError: the URL is malformed, not allowed, or nothing can be loaded from it in time.
            MediaTooLargeError: more than the policy's `max_image_bytes`.
        """
        if not isinstance(url, str):
            raise MediaError(f"image_url: expected a URL as a string, got {type(url).__name__}")
        url = stripped(url)
        if is_data_url(url):
            if len(url) <= LONG_URL:
                return self._decode(url)
            return await asyncio.get_running_loop().run_in_executor(self._reader, self._decode, url)
        if not has_scheme(url):  # first: this may be the data of an image, of any length and in lines
            raise _no_url(url)
        if len(url) > MAX_URL_LENGTH:
            raise MediaError(f"image {shorten(url)}: {len(url)} characters, expected at most {MAX_URL_LENGTH}")
        if not url.isprintable():
            raise MediaError(f"image {shorten(url)}: control characters, expected a URL")
        try:
            async with asyncio.timeout(self._policy.timeout):
                return await self._load(url)
        except TimeoutError as error:
            raise MediaError(f"image {shorten(url)}: took longer than {self._policy.timeout:g} seconds") from error

    def _decode(self, url: str) -> bytes:
        try:
            return decode_data_url(url, self._policy.max_image_bytes)
        except DataUrlTooLargeError as error:
            raise MediaTooLargeError(str(error)) from error
        except ImageError as error:
            raise MediaError(str(error)) from error

    async def close(self) -> None:
        """Closes all connections; loads that have not ended fail."""
        await self._fetcher.close()

    async def _load(self, url: str) -> bytes:
        match url.partition(":")[0].lower():
            case "http" | "https":
                return await self._fetcher.fetch(url)
            case "file":
                limits = self._policy.allowed_local_path, self._policy.max_image_bytes
                return await asyncio.to_thread(read_local_file, url, *limits)
            case _:
                raise _no_url(url)


def _no_url(url: str) -> MediaError:
    return MediaError(
        f"image {shorten(url)}: expected a URL that starts with data:, https:, http: or file:, "
        "and for base64 data 'data:image/png;base64,' before them"
    )
