"""Every redirect is checked like the first URL."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from dpn_rt.server.media.fetch import MAX_URL_LENGTH
from tests.server.media.image_site import HOME, IMAGE, ImageSite, redirect, refused_by_site, response, write_forever


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize(
    "location", ["/there", "there", "//images.test:{port}/there", "http://images.test:{port}/there", "?x/../there"]
)
def test_are_followed(status: str, location: str) -> None:
    site = ImageSite(
        {"/image": redirect(location, status), "/there": response(IMAGE), "/image?x/../there": response(IMAGE)}
    )
    assert site.load(HOME) == IMAGE


def test_to_another_listed_host() -> None:
    site = ImageSite({"/image": redirect("http://cdn.test:{port}/there"), "/there": response(IMAGE)})
    assert site.load(HOME, domains=["images.test", "cdn.test"]) == IMAGE
    assert site.lookups == ["images.test", "cdn.test"]


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://other.test:{port}/there", "not in this server's list"),
        ("//other.test:{port}/there", "not in this server's list"),
        ("http://127.0.0.1:{port}/there", "not in this server's list"),
        ("http://169.254.169.254/latest/meta-data", "not in this server's list"),
        ("file:///etc/passwd", "expected http or https"),
        ("ftp://images.test/there", "expected http or https"),
        ("data:image/png;base64,QUJD", "expected http or https"),
        ("http://user:word@images.test:{port}/there", "user name or password"),
        ("http://images.test:0/there", "port 0"),
        ("http://images.test:x/there", "not a URL"),
        ("http://[there", "not in this server's list"),
        ("http://[1.2.3.4]/", "not a URL"),
        ("/" + "a" * MAX_URL_LENGTH, "characters, expected at most"),
    ],
)
def test_to_what_is_not_allowed(location: str, reason: str) -> None:
    site = ImageSite({"/image": redirect(location), "/there": response(IMAGE)})
    message = refused_by_site(site, HOME)
    assert reason in message
    assert "images.test" in message
    assert len(site.requests) == 1


def test_to_a_listed_host_with_a_private_address() -> None:
    def resolve(host: str) -> Sequence[str]:
        return {"images.test": ["127.0.0.1"], "cdn.test": ["127.0.0.2"]}[host]

    site = ImageSite({"/image": redirect("http://cdn.test:{port}/there"), "/there": response(IMAGE)})
    message = refused_by_site(site, HOME, domains=["images.test", "cdn.test"], resolve=resolve)
    assert "the host 'cdn.test' has an address that is not public" in message
    assert "redirected from 'http://images.test" in message
    assert site.connections == 1


def test_from_https_to_http() -> None:
    site = ImageSite({"/image": redirect("http://images.test:{port}/there")}, tls=True)
    assert "from https to http" in refused_by_site(site, HOME.replace("http", "https"))
    assert site.connections == 1


def test_the_limit_is_exact() -> None:
    site = ImageSite({"/image": redirect("/1"), "/1": redirect("/2"), "/2": response(IMAGE)})
    assert site.load(HOME, max_redirects=2) == IMAGE
    assert "too many redirects, expected at most 1" in refused_by_site(site, HOME, max_redirects=1)
    assert len(site.requests) == 5
    assert "too many redirects, expected at most 0" in refused_by_site(site, HOME, max_redirects=0)


def test_loops() -> None:
    site = ImageSite({"/image": redirect("/back"), "/back": redirect("/image")})
    assert "too many redirects" in refused_by_site(site, HOME)
    assert len(site.requests) == 4


def test_without_a_location() -> None:
    assert "status 302 without a Location" in refused_by_site(ImageSite({"/image": response(status="302 Found")}), HOME)


def test_to_bytes_that_are_no_text() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: /\xff\r\nContent-Length: 0\r\n\r\n"
    assert "not a URL" in refused_by_site(ImageSite({"/image": answer}), HOME)


def test_the_body_is_not_read() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(response(status="302 Found", Location="/there", Content_Length=""))
        await write_forever(writer, b"x" * 65536)

    site = ImageSite({"/image": endless, "/there": response(IMAGE)})
    assert site.load(HOME) == IMAGE
    assert site.cut_off == ["/image"]
