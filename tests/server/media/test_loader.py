"""The loader alone: URLs that it cannot load, its settings, and the content of its messages."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpn_rt.errors import ConfigError, ImageError
from dpn_rt.prompts.data_url import shorten
from dpn_rt.server.media.fetch import MAX_URL_LENGTH
from dpn_rt.server.media.policy import MediaError, MediaPolicy, MediaTooLargeError
from tests.server.media.image_site import load, refused


@pytest.mark.parametrize("url", [None, 7, b"data:,x", ["data:,x"], {"url": "data:,x"}])
def test_not_a_string(url: object) -> None:
    assert f"expected a URL as a string, got {type(url).__name__}" in refused(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        ":",
        "cat.jpg",
        "/etc/passwd",
        "data",
        "http",
        "ftp://images.test/a",
        "ws://images.test/",
        "javascript:alert(1)",
        "unix:///run/x.sock",
        "gopher://images.test/",
        "blob:http://images.test/1",
    ],
)
def test_other_schemes(url: str, tmp_path: Path) -> None:
    message = refused(url, allowed_domains=frozenset({"images.test"}), allowed_local_path=tmp_path)
    assert "starts with data:, https:, http: or file:" in message


@pytest.mark.parametrize("character", ["\0", "\n", "\r\n", "\t", "\x7f", "\x85", "\u2028", "\ud800", "\u202e"])
@pytest.mark.parametrize("url", ["http://images.test/a{}b", "http://images{}.test/", "file:///a{}b", "htt{}p://a/"])
def test_control_characters(url: str, character: str) -> None:
    message = refused(url.format(character), allowed_domains=frozenset({"images.test"}))
    assert "control characters" in message
    assert message.isprintable()


@pytest.mark.parametrize("around", [" ", "\n", "\r\n", "\t", " \n \t"])
def test_white_space_around_a_url_is_ignored(around: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"ABC")
    for url in ("data:image/png;base64,QUJD", "DATA:image/png,ABC", f"file://{tmp_path}/a.png"):
        for padded in (around + url, url + around, around + url + around):
            assert load(padded, allowed_local_path=tmp_path) == b"ABC"
    message = refused(f"{around}http://other.test/{around}", allowed_domains=frozenset({"images.test"}))
    assert "the host 'other.test' is not in this server's list" in message


FILES = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF", "GIF": b"GIF89a", "BMP": b"BM"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [30, 300, 21_000, 200_000])
@pytest.mark.parametrize("columns", [0, 64, 76])
@pytest.mark.parametrize("before", ["", "image/png;base64,", "base64,"])
def test_base64_without_a_data_url(name: str, size: int, columns: int, before: str) -> None:
    """Of any length, in one line or many, it is told what to write before it, and is not repeated."""
    data = base64.b64encode(FILES[name] + bytes(range(256)) * (size // 256 + 1)).decode()[: size // 3 * 4]
    lines = [data[i : i + columns] for i in range(0, len(data), columns)] if columns else [data]
    message = refused(before + "\n".join(lines))
    assert "and for base64 data 'data:image/png;base64,' before them" in message
    assert len(message) < 250 and data[:20] not in message


@pytest.mark.parametrize(
    "before", ["dat:image/png;base64,", "image:", "base64:", "'data:image/png;base64,", "b64://a;base64,"]
)
def test_base64_after_something_else(before: str) -> None:
    assert "iVBORw0KGgoAAAA" not in refused(before + "iVBORw0KGgoAAAA" * 100)
    assert "iVBORw0KGgoAAAA" not in refused(before + "iVBORw0KGgoAAAA" * 3)


@pytest.mark.parametrize("start", ["http://images.test/", "file:///", "ftp://"])
def test_too_long(start: str) -> None:
    url = start.ljust(MAX_URL_LENGTH + 1, "a")
    message = refused(url, allowed_domains=frozenset({"images.test"}))
    assert f"{MAX_URL_LENGTH + 1} characters, expected at most {MAX_URL_LENGTH}" in message
    assert len(message) < 200


def test_errors_are_image_errors() -> None:
    assert issubclass(MediaTooLargeError, MediaError)
    assert issubclass(MediaError, ImageError)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://images.test/a", "'http://images.test/a'"),
        ("http://images.test/a?signature=secret", "'http://images.test/a…'"),
        ("http://images.test/a#secret", "'http://images.test/a…'"),
        ("http://user:secret@images.test/", "'http://…@images.test/'"),
        ("http://user:secret@else@images.test/", "'http://…@images.test/'"),
        ("data:image/png;base64,secret", "'data:image/png;base64,…'"),
        (" DATA:image/png,secret", "' DATA:image/png,…'"),
        ("data:secret", "'data:…'"),
        ("http://images.test/\n\x1b[31m", r"'http://images.test/\n\x1b[31m'"),
    ],
)
def test_secrets_are_left_out(url: str, shown: str) -> None:
    assert shorten(url) == shown


def test_a_long_password_is_left_out() -> None:
    assert "secret" not in shorten(f"http://user:{'secret' * 3000}@images.test/")
    for start in ("http://user:secret", "http://images.test//user:secret", "http:////user:secret"):
        assert "secret" not in shorten(start + "a" * 2**20 + "@images.test/")
    assert "secret" not in shorten("http://images.test/a?" + "secret" * 2**20)
    assert shorten("http://images.test/" + "a" * 2**20).startswith("'http://images.test/aaa")


@given(st.text())
def test_short_and_printable(url: str) -> None:
    assert shorten(url).isprintable()
    for prefix in ("", "data:", "data:,", "data:image/png;", "http://"):
        assert len(shorten(prefix + "a" * 200 + url)) < 90 + 10 * len(url)


@pytest.mark.parametrize(
    "domain",
    [
        "",
        "Images.test",
        "images.test:80",
        "http://images.test",
        "images.test/",
        "*.images.test",
        "bücher.test",
        "user@images.test",
        "images test",
        ".test\n",
    ],
)
def test_domains_that_would_match_nothing(domain: str) -> None:
    with pytest.raises(ConfigError, match=f"allowed_domains: {re.escape(repr(domain))}"):
        MediaPolicy(frozenset({domain}))


@pytest.mark.parametrize(
    "domain", ["images.test", "xn--bcher-kva.test", "a_b.test", "8.8.8.8", "2606:4700::1111", "host"]
)
def test_domains(domain: str) -> None:
    MediaPolicy(frozenset({domain}))


@pytest.mark.parametrize("name", ["max_image_bytes", "timeout", "max_redirects"])
def test_numbers(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: -1"):
        MediaPolicy(**{name: -1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="timeout: nan"):
        MediaPolicy(timeout=float("nan"))


def test_the_folder_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        MediaPolicy(allowed_local_path=tmp_path / "missing")
