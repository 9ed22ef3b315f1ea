"""Images come from listed hosts only, and only from the addresses that were checked."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from dpn_rt.server.media.loader import MediaLoader
from dpn_rt.server.media.policy import MediaError, MediaPolicy
from tests.server.media.image_site import HOME, IMAGE, ImageSite, refused, refused_by_site, response

HTTPS = HOME.replace("http:", "https:")


def test_an_image_and_its_request() -> None:
    site = ImageSite({"/image?size=1": response(IMAGE)})
    assert site.load(f"{HOME}?size=1#top") == IMAGE
    [request] = site.requests
    headers = dict(line.split(": ", 1) for line in request.strip().split("\r\n")[1:])
    assert re.fullmatch(r"images\.test:\d+", headers.pop("Host"))
    expected = {"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close", "User-Agent": "dpn_rt"}
    assert headers == expected


@pytest.mark.parametrize("host", ["IMAGES.test", "Images.Test"])
def test_capitals(host: str) -> None:
    assert ImageSite({"/image": response(IMAGE)}).load(HOME.replace("images.test", host)) == IMAGE


def test_an_international_name() -> None:
    site = ImageSite({"/image": response(IMAGE)})
    assert site.load(HOME.replace("images", "bücher"), domains=["xn--bcher-kva.test"]) == IMAGE
    assert site.lookups == ["xn--bcher-kva.test"]


@pytest.mark.parametrize(
    "host",
    [
        "other.test",
        "127.0.0.1",
        "localhost",
        "[::1]",
        "2130706433",
        "0x7f.1",
        "sub.images.test",
        "evilimages.test",
        "images.test.evil.test",
        "images.test.",
        "images.test%2eevil.test",
        "images%2etest",
        "xn--images.test",
        "",
        "/images.test",
        "evil.test\\images.test",
        "[images.test",
    ],
)
def test_hosts_that_are_not_listed(host: str) -> None:
    site = ImageSite({"/image": response(IMAGE)})
    assert "not in this server's list" in refused_by_site(site, HOME.replace("images.test", host))
    assert site.lookups == []
    assert site.connections == 0


@pytest.mark.parametrize(
    "url", ["http:", "http:image", "http://", "https:/images.test/image", "http:\\\\images.test/image"]
)
def test_no_host(url: str) -> None:
    assert "not in this server's list" in refused(url, allowed_domains=frozenset({"images.test"}))


def test_nothing_is_fetched_by_default() -> None:
    site = ImageSite({"/image": response(IMAGE)})
    assert "not in this server's list" in refused_by_site(site, HOME, domains=[])


@pytest.mark.parametrize("user", ["user", "user:word", ":word", "images.test", "other.test\\"])
def test_user_and_password(user: str) -> None:
    site = ImageSite({"/image": response(IMAGE)})
    message = refused_by_site(site, HOME.replace("//", f"//{user}@"))
    assert "user name or password" in message
    assert user not in message.replace("images.test:", "").replace("user name", "")
    assert site.connections == 0


@pytest.mark.parametrize(
    "host", ["images.test:x", "images.test:80:80", "[1.2.3.4]", "[::1", "999.1.1.1", "１２７.0.0.1"]
)
def test_not_a_url(host: str) -> None:
    assert "not a URL" in refused(f"http://{host}/", allowed_domains=frozenset({"images.test"}))


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_ports_that_do_not_exist(port: int) -> None:
    assert f"port {port}" in refused(f"http://images.test:{port}/", allowed_domains=frozenset({"images.test"}))


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_proxies_of_the_environment_are_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ImageSite({"/image": response(IMAGE)}).load(HOME) == IMAGE


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["0.0.0.0"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["fe80::1%eth0"],
        ["localhost"],
        ["8.8.8.8", "127.0.0.1"],
    ],
)
def test_a_listed_host_with_a_private_address(addresses: list[str]) -> None:
    site = ImageSite({"/image": response(IMAGE)})
    message = refused_by_site(site, HOME, resolve=lambda host: addresses, is_allowed_address=None)
    assert "address that is not public" in message
    assert addresses[-1] not in message
    assert site.connections == 0


def test_the_default_lookup_is_checked() -> None:
    loader = MediaLoader(MediaPolicy(frozenset({"localhost", "127.0.0.1", "2130706433"})))
    for host in ("localhost", "127.0.0.1", "2130706433"):
        with pytest.raises(MediaError, match="address that is not public"):
            asyncio.run(loader.load(f"http://{host}:9/"))


def test_rebinding() -> None:
    # A second lookup would give an address that was not checked.
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    site = ImageSite({"/image": response(IMAGE)})
    assert site.load(HOME, resolve=lambda host: next(answers)) == IMAGE
    assert site.lookups == ["images.test"]


def test_the_system_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: object, *rest: object, **more: object) -> Any:
        if host != "127.0.0.1":
            raise AssertionError(f"{host} was looked up again")
        return original(host, *rest, **more)  # type: ignore[arg-type]

    original = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert ImageSite({"/image": response(IMAGE)}).load(HOME) == IMAGE


def test_every_connection_is_checked() -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    site = ImageSite({"/image": response(IMAGE)})
    message = refused_by_site(site, HOME, HOME, resolve=lambda host: next(answers))
    assert "address that is not public" in message
    assert site.lookups == ["images.test"] * 2
    assert site.connections == 1


def test_the_next_address_is_tried() -> None:
    site = ImageSite({"/image": response(IMAGE)})
    both = ["127.0.0.2", "127.0.0.1"]  # nothing listens at the first
    assert site.load(HOME, resolve=lambda host: both, is_allowed_address=both.__contains__) == IMAGE


def test_no_address() -> None:
    def resolve(host: str) -> Sequence[str]:
        raise socket.gaierror(-2, "Name or service not known")

    site = ImageSite({})
    assert "cannot be fetched: its host has no address" in refused_by_site(site, HOME, resolve=resolve)
    assert "has no address" in refused_by_site(site, HOME, resolve=lambda host: [])


def test_a_name_that_cannot_be_looked_up() -> None:
    host = "a" * 64 + ".test"  # labels have at most 63 characters
    assert "cannot be fetched" in refused(f"http://{host}/", allowed_domains=frozenset({host}))


def test_no_server_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        message = refused_by_site(ImageSite({}), f"http://images.test:{unused.getsockname()[1]}/")
    assert "cannot be fetched" in message


def test_a_trusted_certificate() -> None:
    assert ImageSite({"/image": response(IMAGE)}, tls=True).load(HTTPS) == IMAGE


def test_a_certificate_for_another_name() -> None:
    site = ImageSite({"/image": response(IMAGE)}, tls=True)
    message = refused_by_site(site, HTTPS.replace("images", "other"), domains=["other.test"])
    assert "certificate" in message.lower()
    assert site.requests == []


def test_an_unknown_certificate() -> None:
    site = ImageSite({"/image": response(IMAGE)}, tls=True)
    assert "certificate" in refused_by_site(site, HTTPS, trusted=False).lower()
    assert site.requests == []


def test_no_tls_at_all() -> None:
    # Each waits for the other; the site also checks that the connection is closed in the end.
    assert "took longer" in refused_by_site(ImageSite({"/image": response(IMAGE)}), HTTPS, timeout=0.1)


def test_many_at_once() -> None:
    async def load_all() -> None:
        site = ImageSite({f"/{index}": response(IMAGE + bytes([index])) for index in range(100)})
        async with site.loader() as load:
            images = await asyncio.gather(*(load(f"http://images.test:{{port}}/{index}") for index in range(100)))
        assert images == [IMAGE + bytes([index]) for index in range(100)]

    asyncio.run(load_all())
