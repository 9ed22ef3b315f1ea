"""A web site on the loopback interface. Tests give every byte of its answers."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpn_rt.server.media.loader import MediaLoader
from dpn_rt.server.media.policy import MediaError, MediaPolicy

CERTIFICATE = Path(__file__).with_name("images_test.pem")
"""Self-signed certificate for the name images.test, with its (worthless) key; valid until 2126."""

TRUSTING = ssl.create_default_context(cafile=CERTIFICATE)

IMAGE = bytes(range(256)) * 3

HOME = "http://images.test:{port}/image"

Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


def response(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """A whole response; `Content_Length="7"` and the like replace or add headers, "" leaves one out."""
    fields = {"Content_Length": str(len(body)), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return response(status=status, Location=location)


class ImageSite:
    """Answers requests by path; `{port}` in URLs and answers is the site's port.

    `requests` holds the heads of requests, `lookups` the host names that were looked up, `cut_off` the paths whose
    connections the other side closed before the answer was written.
    """

    def __init__(self, answers: Mapping[str, Answer], tls: bool = False) -> None:
        self.answers = answers
        self.tls = tls
        self.requests: list[str] = []
        self.lookups: list[str] = []
        self.cut_off: list[str] = []
        self.connections = 0
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def load(self, *urls: str, **options: Any) -> bytes:
        """The result of the last of `urls`; see `loader` for `options`."""

        async def load_all() -> bytes:
            async with self.loader(**options) as load:
                for url in urls[:-1]:
                    await load(url)
                return await load(urls[-1])

        return asyncio.run(load_all())

    @contextlib.asynccontextmanager
    async def loader(
        self,
        *,
        domains: Sequence[str] = ("images.test",),
        resolve: Callable[[str], Sequence[str]] = lambda host: ["127.0.0.1"],
        is_allowed_address: Callable[[str], bool] | None = lambda address: address == "127.0.0.1",
        trusted: bool = True,
        **policy: Any,
    ) -> AsyncIterator[Callable[[str], Awaitable[bytes]]]:
        """`MediaLoader.load` while the site is up; `is_allowed_address=None` is the loader's default."""

        async def lookup(host: str) -> Sequence[str]:
            self.lookups.append(host)
            return resolve(host)

        hooks: dict[str, Any] = {"is_allowed_address": is_allowed_address} if is_allowed_address else {}
        if trusted:
            hooks["ssl_context"] = TRUSTING
        loader = MediaLoader(MediaPolicy(frozenset(domains), **policy), resolve=lookup, **hooks)
        async with self._serving():
            try:
                yield lambda url: loader.load(url.replace("{port}", str(self._port)))
            finally:
                await loader.close()

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        tls = None
        if self.tls:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(CERTIFICATE)
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self._port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            # A connection that does not end was not closed by the loader.
            await asyncio.wait_for(asyncio.gather(*self._tasks), timeout=5)
            self._tasks.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(head)
            await self._answer(head.split(" ")[1], reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()

    async def _answer(self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering = asyncio.ensure_future(self._write(self.answers[path], writer))
        closed = asyncio.ensure_future(reader.read())
        await asyncio.wait([answering, closed], return_when=asyncio.FIRST_COMPLETED)
        if not answering.done() or answering.exception() is not None:
            self.cut_off.append(path)
        for task in (answering, closed):
            task.cancel()
        await asyncio.gather(answering, closed, return_exceptions=True)

    async def _write(self, answer: Answer, writer: asyncio.StreamWriter) -> None:
        if isinstance(answer, bytes):
            writer.write(answer.replace(b"{port}", str(self._port).encode()))
        else:
            await answer(writer)
        await writer.drain()


async def write_forever(writer: asyncio.StreamWriter, chunk: bytes, seconds: float = 0.0) -> None:
    while True:
        writer.write(chunk)
        await writer.drain()
        await asyncio.sleep(seconds)


def load(url: Any, **policy: Any) -> bytes:
    return asyncio.run(MediaLoader(MediaPolicy(**policy), ssl_context=TRUSTING).load(url))


def refused(url: Any, **policy: Any) -> str:
    """The message with which `url` is refused; the reason must not be its size."""
    with pytest.raises(MediaError) as caught:
        load(url, **policy)
    assert type(caught.value) is MediaError
    return str(caught.value)


def refused_by_site(site: ImageSite, *urls: str, error: type[MediaError] = MediaError, **options: Any) -> str:
    with pytest.raises(MediaError) as caught:
        site.load(*urls, **options)
    assert type(caught.value) is error
    return str(caught.value)
