"""Connections to checked addresses only."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any

import httpcore

from dpn_rt.server.media.addresses import IsAllowedAddress, Resolve


class RefusedAddressError(Exception):
    """A host name has an address to which the server must not connect, or none."""


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Looks a host up once, checks all of its addresses, and connects to those same addresses.

    A separate check would look the name up twice, and the second answer may differ from the first.
    """

    def __init__(self, resolve: Resolve, is_allowed_address: IsAllowedAddress) -> None:
        self._resolve = resolve
        self._is_allowed_address = is_allowed_address
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first address of `host` that accepts one. Each gets an equal share of `timeout` seconds.

        Raises:
            RefusedAddressError: any of the addresses is not allowed, or there is none.
            OSError: the host is unknown.
            httpcore.ConnectError, httpcore.ConnectTimeout: no address accepts a connection.
        """
        addresses = list(dict.fromkeys(await self._resolve(host)))
        if not all(map(self._is_allowed_address, addresses)):
            # The message leaves the address out: it would tell clients about the network behind the server.
            raise RefusedAddressError(f"the host {host!r} has an address that is not public, expected public ones")
        failure: Exception = RefusedAddressError(f"the host {host!r} has no address")
        for address in addresses:
            try:
                share = timeout and timeout / len(addresses)
                stream = await self._backend.connect_tcp(address, port, share, local_address, socket_options)
                return _CancellableStream(stream)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


class _CancellableStream(httpcore.AsyncNetworkStream):
    """A TCP connection that is closed when its TLS handshake is cancelled. httpcore would leave it open."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        try:
            return await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            await self._stream.aclose()
            raise

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
