"""http(s) URLs -> bytes. Allowed hosts, public addresses and bounded size only, also after every redirect."""

from __future__ import annotations

import socket
import ssl
from typing import NoReturn

import httpcore
import httpx

from dpn_rt.prompts.data_url import shorten
from dpn_rt.server.media.addresses import IsAllowedAddress, Resolve
from dpn_rt.server.media.connect import CheckedBackend, RefusedAddressError
from dpn_rt.server.media.policy import MediaError, MediaPolicy, MediaTooLargeError

MAX_CONNECTIONS = 32
"""Images that are fetched at the same time. Others wait, and their timeout includes the wait."""

MAX_URL_LENGTH = 8192
"""Characters of a URL, as sent or as redirected to. Signed URLs of object stores have one or two thousand."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close"), ("User-Agent", "dpn_rt")]
_FAILURES = (
    RefusedAddressError,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    OSError,  # name lookup and TLS
    UnicodeError,  # a host name that cannot be encoded for the lookup
)


class Fetcher:
    """Fetches images with httpcore, which by itself uses no proxies, cookies, decompression or redirects."""

    def __init__(
        self,
        policy: MediaPolicy,
        resolve: Resolve,
        is_allowed_address: IsAllowedAddress,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context or httpx.create_ssl_context(),
            max_connections=MAX_CONNECTIONS,
            # Bytes after a response would be read as the response to the next request on the connection.
            max_keepalive_connections=0,
            network_backend=CheckedBackend(resolve, is_allowed_address),
        )

    async def close(self) -> None:
        """Closes the connections; fetches that have not ended fail."""
        await self._pool.aclose()

    async def fetch(self, address: str) -> bytes:
        """The body of the response with status 200 to which `address` leads. Only connecting has a timeout here.

        Raises:
            MediaError: the URL or one that it redirects to is not allowed, or does not answer with an image's bytes.
            MediaTooLargeError: more than the policy's `max_image_bytes`.
        """
        name = f"image {shorten(address)}"
        url = self._checked(address, name)
        for _ in range(self._policy.max_redirects + 1):
            answer = await self._get(url, name)
            if isinstance(answer, bytes):
                return answer
            name = f"image {shorten(str(answer))} (redirected from {shorten(address)})"
            if url.scheme == "https" and answer.scheme == "http":
                raise MediaError(f"{name}: from https to http, expected https to stay")
            url = self._checked(str(answer), name)
        raise MediaError(f"{name}: too many redirects, expected at most {self._policy.max_redirects}")

    def _checked(self, address: str, name: str) -> httpx.URL:
        if len(address) > MAX_URL_LENGTH:
            raise MediaError(f"{name}: {len(address)} characters, expected at most {MAX_URL_LENGTH}")
        url = _parse(address, name)
        if url.scheme not in ("http", "https"):
            raise MediaError(f"{name}: scheme {url.scheme!r:.40}, expected http or https")
        if url.userinfo:
            raise MediaError(f"{name}: has a user name or password, expected none")
        host = url.raw_host.decode("ascii")
        if host not in self._policy.allowed_domains:
            raise MediaError(f"{name}: the host {host!r:.80} is not in this server's list of allowed domains")
        if url.port is not None and not 0 < url.port < 65536:
            raise MediaError(f"{name}: port {url.port}, expected 1 to 65535")
        return url

    async def _get(self, url: httpx.URL, name: str) -> bytes | httpx.URL:
        """The body, or the URL of a redirect."""
        # Made of the parsed parts, not of the text, so that the connection goes to the host that was checked.
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        headers = [("Host", url.netloc.decode("ascii")), *_HEADERS]
        extensions = {"timeout": {"connect": self._policy.timeout}}
        try:
            async with self._pool.stream("GET", target, headers=headers, extensions=extensions) as response:
                if response.status in _REDIRECTS:
                    return _redirect_target(url, response, name)
                return await self._body(response, name)
        except _FAILURES as error:
            raise MediaError(f"{name}: cannot be fetched: {_reason(error)}") from error

    async def _body(self, response: httpcore.Response, name: str) -> bytes:
        if response.status != 200:
            raise MediaError(f"{name}: its server answered with status {response.status}, expected 200")
        # A few compressed bytes may expand to gigabytes, and images are compressed already.
        encoding = _header(response, b"content-encoding") or b"identity"
        if encoding.lower() != b"identity":
            raise MediaError(f"{name}: content encoding {encoding!r:.40}, expected none, as asked for")
        length = _header(response, b"content-length")
        if length is not None and int(length) > self._policy.max_image_bytes:
            self._too_large(name, f"{int(length)} bytes")
        body = bytearray()
        async for chunk in response.aiter_stream():
            body += chunk
            if len(body) > self._policy.max_image_bytes:
                self._too_large(name, f"{len(body)} bytes or more")
        return bytes(body)

    def _too_large(self, name: str, size: str) -> NoReturn:
        raise MediaTooLargeError(f"{name}: {size}, expected at most {self._policy.max_image_bytes}")


def _reason(error: Exception) -> str:
    """Why a fetch failed, in the server's own words: those of a library may name addresses of the server's network."""
    causes = (error, error.__cause__, error.__context__)
    if isinstance(error, RefusedAddressError):
        return str(error)
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return "its server has no certificate that is valid for the host"
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return "no TLS connection to its server"
    if isinstance(error, socket.gaierror | UnicodeError):
        return "its host has no address"
    if isinstance(error, httpcore.TimeoutException):
        return "its server took too long"
    if isinstance(error, httpcore.ConnectError):
        return "no connection to its server"
    return "its server's answer broke off or is not HTTP"


def _parse(address: str, name: str) -> httpx.URL:
    try:
        return httpx.URL(address)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise MediaError(f"{name}: not a URL, expected https://host/path") from error


def _redirect_target(url: httpx.URL, response: httpcore.Response, name: str) -> httpx.URL:
    location = _header(response, b"location")
    if location is None:
        raise MediaError(f"{name}: status {response.status} without a Location, expected 200")
    try:
        return url.join(location.decode("utf-8"))
    except (httpx.InvalidURL, ValueError) as error:
        raise MediaError(f"{name}: redirects to something that is not a URL: {location!r:.80}") from error


def _header(response: httpcore.Response, wanted: bytes) -> bytes | None:
    return next((value for name, value in response.headers if name.lower() == wanted), None)
