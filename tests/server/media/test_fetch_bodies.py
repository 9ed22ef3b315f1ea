"""Any answer of a server, however slow, gives the unchanged image or an error."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Sequence

import pytest

from dpn_rt.server.media.fetch import MAX_CONNECTIONS
from dpn_rt.server.media.loader import MediaLoader
from dpn_rt.server.media.policy import MediaError, MediaPolicy, MediaTooLargeError
from tests.server.media.image_site import HOME, IMAGE, ImageSite, redirect, refused_by_site, response, write_forever


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 403, 404, 410, 429, 500, 503])
def test_other_statuses(status: int) -> None:
    site = ImageSite({"/image": response(b"" if status in (204, 304) else IMAGE, f"{status} Reason")})
    assert f"status {status}, expected 200" in refused_by_site(site, HOME)


@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
def test_the_limit_is_exact(framing: str) -> None:
    site = ImageSite({"/image": framed(IMAGE, framing)})
    assert site.load(HOME, max_image_bytes=len(IMAGE)) == IMAGE
    refused_by_site(site, HOME, max_image_bytes=len(IMAGE) - 1, error=MediaTooLargeError)


def test_a_large_length_is_refused_before_reading() -> None:
    async def only_head(writer: asyncio.StreamWriter) -> None:
        writer.write(response(Content_Length="1000001"))
        await asyncio.sleep(60)

    site = ImageSite({"/image": only_head})
    message = refused_by_site(site, HOME, max_image_bytes=1_000_000, error=MediaTooLargeError)
    assert "1000001 bytes, expected at most 1000000" in message


@pytest.mark.parametrize("chunked", [False, True])
def test_endless_bodies_are_cut_off(chunked: bool) -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(response(Content_Length="", Transfer_Encoding="chunked" if chunked else ""))
        await write_forever(writer, b"1000\r\n" + b"x" * 4096 + b"\r\n")

    site = ImageSite({"/image": endless})
    refused_by_site(site, HOME, max_image_bytes=100_000, error=MediaTooLargeError)
    assert site.cut_off == ["/image"]


def test_shorter_than_its_length() -> None:
    site = ImageSite({"/image": response(IMAGE, Content_Length=str(len(IMAGE) + 1))})
    assert "cannot be fetched: its server's answer broke off" in refused_by_site(site, HOME)


def test_longer_than_its_length() -> None:
    # The rest belongs to no response. It must not become the answer to the next request either.
    extra = response(b"of somebody else")
    site = ImageSite({"/image": response(IMAGE) + extra})
    assert site.load(HOME, HOME) == IMAGE
    assert site.connections == 2


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        bytes(100),
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        OK,
        OK + b"no colon\r\n\r\n",
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"Content-Length: 1e3\r\n\r\n",
        OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        OK + b"Transfer-Encoding: gzip\r\n\r\nabc",
        OK + b"X-Filler: aaaaaaaaaaaaaaaa\r\n" * 10_000 + b"\r\n",
        CHUNKED + b"5\r\nabc",
        CHUNKED + b"3\r\nabc\r\n",
        CHUNKED + b"xyz\r\nabc\r\n0\r\n\r\n",
    ],
)
def test_broken_responses(answer: bytes) -> None:
    refused_by_site(ImageSite({"/image": answer}), HOME)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "x"])
def test_compressed_bodies(encoding: str) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    site = ImageSite({"/image": response(bomb, Content_Encoding=encoding)})
    assert "content encoding" in refused_by_site(site, HOME, max_image_bytes=1_000_000)


def test_identity_is_no_encoding() -> None:
    assert ImageSite({"/image": response(IMAGE, Content_Encoding="Identity")}).load(HOME) == IMAGE


def framed(body: bytes, framing: str) -> bytes:
    """A response whose end is marked by its length, by chunks, or by the end of the connection."""
    if framing == "length":
        return response(body)
    if framing == "close":
        return response(body, Content_Length="")
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:5], body[5:], b""))
    return response(chunks, Content_Length="", Transfer_Encoding="chunked")


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nX-Filler: ", response(Content_Length="1000000")])
def test_slow_responses(head: bytes) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await write_forever(writer, b"x" if head else b"", 0.01)

    assert "took longer than 0.1 seconds" in refused_by_site(ImageSite({"/image": drip}), HOME, timeout=0.1)


def test_endless_provisional_responses() -> None:
    async def hints(writer: asyncio.StreamWriter) -> None:
        await write_forever(writer, b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.001)

    assert "took longer" in refused_by_site(ImageSite({"/image": hints}), HOME, timeout=0.1)


def test_redirects_count_together() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write(redirect("/image"))

    site = ImageSite({"/image": slow})
    assert "took longer" in refused_by_site(site, HOME, timeout=0.2, max_redirects=1000)
    assert len(site.requests) > 1


def test_slow_name_lookup() -> None:
    async def load_slowly() -> None:
        async def resolve(host: str) -> Sequence[str]:
            await asyncio.sleep(60)
            return []

        loader = MediaLoader(MediaPolicy(frozenset({"images.test"}), timeout=0.1), resolve=resolve)
        await loader.load("http://images.test/")

    with pytest.raises(MediaError, match="took longer"):
        asyncio.run(load_slowly())


@pytest.mark.parametrize("scheme", ["http", "https"])  # https: the handshake is not answered
def test_slow_ones_do_not_keep_their_connections(scheme: str) -> None:
    async def silence(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def load_together() -> None:
        site = ImageSite({"/image": response(IMAGE), "/slow": silence})
        async with site.loader(timeout=0.5) as load:
            slow = [load(f"{scheme}://images.test:{{port}}/slow") for _ in range(MAX_CONNECTIONS + 10)]
            failures = await asyncio.gather(*slow, return_exceptions=True)
            assert {type(failure) for failure in failures} == {MediaError}
            assert await load(HOME) == IMAGE
        assert site.connections > 1

    asyncio.run(load_together())
