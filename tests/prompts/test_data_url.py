"""`data:` URLs give back the encoded bytes, or are refused without being shown."""

from __future__ import annotations

import base64
import tracemalloc
from unittest.mock import patch
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpn_rt.errors import ImageError
from dpn_rt.prompts import data_url
from dpn_rt.prompts.data_url import DataUrlTooLargeError, decode_data_url


def load(url: str, max_image_bytes: int = 2**20) -> bytes:
    return decode_data_url(url, max_image_bytes)


def refused(url: str, max_image_bytes: int = 2**20) -> str:
    with pytest.raises(ImageError) as caught:
        load(url, max_image_bytes)
    return str(caught.value)


def base64_url(data: bytes, header: str = "image/png;base64") -> str:
    return f"data:{header},{base64.b64encode(data).decode()}"


@given(
    st.binary(),
    st.sampled_from(["image/png", "IMAGE/svg+xml", "image/x-a.b", "application/octet-stream", ""]),
    st.sampled_from(["", ";charset=utf-8", ";a=b;c=d"]),
    st.sampled_from([";base64", ";BASE64"]),
)
def test_base64_round_trip(data: bytes, media_type: str, parameters: str, marker: str) -> None:
    assert load(base64_url(data, media_type + parameters + marker), max_image_bytes=max(1, len(data))) == data


@given(st.binary())
def test_escaped_base64_round_trip(data: bytes) -> None:
    url = base64_url(data).replace("+", "%2b").replace("/", "%2F").replace("image%2F", "image/").replace("=", "%3D")
    assert load(url, max_image_bytes=max(1, len(data))) == data


@given(st.binary(), st.sets(st.sampled_from([chr(code) for code in range(32, 127) if chr(code) != "%"])))
def test_escaped_round_trip(data: bytes, safe: set[str]) -> None:
    url = "data:image/bmp," + quote(data, safe="".join(safe))
    assert load(url, max_image_bytes=max(1, len(data))) == data


def test_equals_signs_are_no_escapes() -> None:
    assert load("data:,a=41=%3d%20=") == b"a=41== ="


@pytest.mark.parametrize("header", ["image/png; base64", "image/png;base64 ", ";  BASE64", "image/png;a=b; base64"])
def test_spaces_beside_base64(header: str) -> None:
    assert load(f"data:{header},QUJD") == b"ABC"


def test_scheme_in_capitals() -> None:
    assert load("DATA:image/png;base64,QUJD") == b"ABC"


@pytest.mark.parametrize(
    "header",
    [
        "text/html",
        "text/plain;base64",
        "image",
        "image/",
        "imagex/png",
        "image/png/x",
        "image/p ng",
        " image/png",
        "image/png\n;base64",
        "base64",
        "application/json",
        "video/mp4",
        "application/octet-streams",
    ],
)
def test_not_the_type_of_an_image(header: str) -> None:
    assert "expected the media type image/*" in refused(f"data:{header},QUJD")


@pytest.mark.parametrize("url", ["data:", "data:image/png;base64", "data:QUJD"])
def test_no_comma(url: str) -> None:
    assert "no comma" in refused(url)


@pytest.mark.parametrize(
    "text",
    [
        "Q",
        "QQ=",
        "QUJD=",
        "QUJD====",
        "QQ======",
        "QQ==QQ==",
        "QQ==x",
        "=QQ=",
        "====",
        "Q!JD",
        "%51",
        "QUJD%3D",
        "QQ%3D",
    ],
)
def test_bad_base64(text: str) -> None:
    assert "bad base64" in refused(f"data:image/png;base64,{text}")


@given(st.binary(), st.data())
def test_base64_as_encoders_write_it(data: bytes, draw: st.DataObject) -> None:
    """Lines of 76 or 64 columns, a newline at the end, no padding, the URL-safe alphabet, and all of it together."""
    encode = draw.draw(st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]))
    text = encode(data).decode()
    if draw.draw(st.booleans()):
        text = text.rstrip("=")
    width, newline = draw.draw(st.sampled_from([4, 64, 76])), draw.draw(st.sampled_from(["", "\n", "\r\n", " ", "%0A"]))
    text = "".join(text[i : i + width] + newline for i in range(0, len(text), width))
    assert load(f"data:image/png;base64,{text}", max_image_bytes=max(1, len(data))) == data


@pytest.mark.parametrize("text", ["QUJD\0", "QUJDé", "QUJD\ud800", "QUJ\u0664"])
@pytest.mark.parametrize("marker", ["", ";base64"])
def test_other_characters(text: str, marker: str) -> None:
    assert "outside of ASCII" in refused(f"data:image/png{marker},{text}")


def test_line_breaks_without_base64() -> None:
    assert "control characters" in refused("data:image/png,QU\nJD")


@pytest.mark.parametrize("text", ["%", "a%", "%4", "%4g", "%g4", "%%41", "% 4", "%+4"])
@pytest.mark.parametrize("marker", ["", ";base64"])
def test_bad_escapes(text: str, marker: str) -> None:
    assert "expected %XX" in refused(f"data:image/png{marker},{text}")


@given(st.binary(min_size=2, max_size=51), st.booleans())
def test_the_limit_is_exact(data: bytes, escaped: bool) -> None:
    def url(data: bytes) -> str:
        return "data:," + "".join(f"%{byte:02X}" for byte in data) if escaped else base64_url(data)

    max_bytes = len(data) - 1
    assert load(url(data[:-1]), max_image_bytes=max_bytes) == data[:-1]
    with pytest.raises(DataUrlTooLargeError, match=f"expected at most {max_bytes}"):
        load(url(data), max_image_bytes=max_bytes)


@pytest.mark.parametrize("marker", ["", ";base64"])
def test_size_is_checked_before_decoding(marker: str) -> None:
    undecodable = "\0" * 1000  # its content would be refused too, if it were read
    with pytest.raises(DataUrlTooLargeError):
        load(f"data:image/png{marker},{undecodable}", max_image_bytes=100)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,SECRET!",
        "data:text/html,SECRET",
        "data:SECRET",
        "data:,%SECRET",
        " data:,SECRET",
        "data:,SECRET" + 100 * "a",
    ],
)
def test_messages_do_not_show_the_data(url: str) -> None:
    with pytest.raises(ImageError) as caught:
        load(url, max_image_bytes=100)
    assert "SECRET" not in str(caught.value)


WRONG = [
    "Q",
    "QQ=",
    "QUJD====",
    "QQ==QQ==",
    "QQ==x",
    "QQ==QUJD",
    "=QQ=",
    "Q!JD",
    "QUJD" * 9 + "%4",
    "%%41",
    "QUJD" * 9 + "Q",
]


@pytest.mark.parametrize("piece", [1, 2, 3, 4, 5, 7])
@given(st.binary(max_size=40), st.data())
def test_the_size_of_pieces_changes_nothing(piece: int, data: bytes, draw: st.DataObject) -> None:
    """Neither an escape, a line break nor a group of digits is cut."""
    newline = draw.draw(st.sampled_from(["", "\n", "\r\n ", "%0d%0A"]))
    encoded = base64.b64encode(data).decode()
    if draw.draw(st.booleans()):
        encoded = "".join(f"%{ord(c):02x}" for c in encoded)
    urls = [
        "data:image/png;base64," + "".join(c + newline for c in encoded)
        if "%" not in encoded
        else f"data:;base64,{encoded}",
        "data:image/png," + quote(data),
    ]
    with patch.object(data_url, "PIECE", piece):
        assert [load(url, max_image_bytes=max(1, len(data))) for url in urls] == [data, data]


@pytest.mark.parametrize("piece", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("text", WRONG)
def test_the_size_of_pieces_changes_no_message(piece: int, text: str) -> None:
    url = f"data:image/png;base64,{text}"
    whole = refused(url)
    with patch.object(data_url, "PIECE", piece):
        assert refused(url) == whole


def test_digits_after_an_end_are_not_kept() -> None:
    for tail in ("=" * 2**21, "=" + "QUJD" * 2**19):
        assert "an = long before the end" in refused(f"data:image/png;base64,QUJD{tail}", 2**24)


@pytest.mark.parametrize("header", ["image/" + "a" * 5000, "image/png" + ";" * 5000, "image/png;a=" + "b" * 5000])
def test_a_header_longer_than_any(header: str) -> None:
    """Its parts would cost as much as the data: a list of millions of parameters, or a long search."""
    assert f"{len(header) + 5} characters before the comma, expected at most 4096" in refused(f"data:{header},QUJD")


@pytest.mark.parametrize("form", ["digits", "lines", "escapes", "all escapes"])
def test_memory_is_that_of_the_data(form: str) -> None:
    data = bytes(range(256)) * 2**14
    text = base64.b64encode(data).decode()
    match form:
        case "lines":
            text = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))
        case "escapes":
            text = text.replace("/", "%2F")
        case "all escapes":
            text = "%41" * (3 * 2**20)
    url = f"data:image/png;base64,{text}"
    tracemalloc.start()
    load(url, max_image_bytes=2**23)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * len(data) + 12 * data_url.PIECE
