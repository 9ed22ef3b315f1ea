"""`data:` URLs (RFC 2397) -> bytes. Their size is checked before they are decoded."""

from __future__ import annotations

import binascii
import re

from dpn_rt.errors import ImageError

SHOWN_LENGTH = 80
"""Approximate length of a URL in a message, in characters."""
_IMAGE_TYPE = re.compile(r"(image/[\w.+-]+|application/octet-stream)?", re.ASCII | re.IGNORECASE)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SPACES = b" \t\r\n\f\v"
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")


class DataUrlTooLargeError(ImageError):
    """A data URL has more bytes than its reader takes."""


def is_data_url(url: str) -> bool:
    """Whether `url` has the scheme `data:`."""
    return url[:5].lower() == "data:"


def shorten(url: str) -> str:
    """`url` for messages: quoted, cut, and without parts that may be secret (data, user and password, query)."""
    if is_data_url(url[:SHOWN_LENGTH].lstrip()):
        head, comma, _ = url.partition(",")
        shown = f"{head[: SHOWN_LENGTH - 2]},…" if comma else "data:…"
    elif ":" not in url and not url.startswith("/"):
        return f"of {len(url)} characters without a scheme"
    else:
        # Cut last: a cut before the "@" would leave the password.
        shown = re.sub(r"//[^/?#]*@", "//…@", re.sub(r"[?#].*", "…", url, flags=re.DOTALL))
        shown = shown if len(shown) <= SHOWN_LENGTH else f"{shown[: SHOWN_LENGTH - 1]}…"
    return repr(shown)


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of `data:[media type][;parameter=value...][;base64],data`.

    Base64 is read as encoders of all kinds write it: in the standard or the URL-safe alphabet, with or without padding,
    in one line or many. Without `;base64` the data are the characters of the URL, with `%XX` escapes.

    Raises:
        ImageError: there is no comma, the media type is not an image's, or the text is not in the encoding it claims.
        DataUrlTooLargeError: more than `max_bytes`, where possible by the length of the text, so before decoding.
    """
    name = f"image {shorten(url)}"
    header, comma, text = url[len("data:") :].partition(",")
    if not comma:
        raise ImageError(f"{name}: no comma, expected 'data:image/png;base64,' and the data")
    media_type, *parameters = header.split(";")
    if not _IMAGE_TYPE.fullmatch(media_type):
        raise ImageError(f"{name}: expected the media type image/*, application/octet-stream or none")
    is_base64 = bool(parameters) and parameters[-1].lower() == "base64"
    if is_base64:
        _check_size(name, _fewest_bytes(text), max_bytes)
        data = _decode_base64(_unescape(_without_spaces(text), name), name)
    else:
        _check_size(name, len(text) - 2 * text.count("%"), max_bytes)
        data = _unescape(text, name)
    _check_size(name, len(data), max_bytes)
    return data


def _fewest_bytes(text: str) -> int:
    """Bytes that base64 text stands for, if all that may be a line break, an escape or padding is."""
    num_spaces = sum(text.count(space) for space in _SPACES.decode())
    return max(0, (len(text) - num_spaces - 3 * text.count("%")) * 3 // 4 - 2)


def _check_size(name: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise DataUrlTooLargeError(f"{name}: {num_bytes} bytes, expected at most {max_bytes}")


def _without_spaces(text: str) -> str:
    return text if text.isprintable() and " " not in text else "".join(text.split())


def _unescape(text: str, name: str) -> bytes:
    if not (text.isascii() and text.isprintable()):
        raise ImageError(f"{name}: control characters or characters outside of ASCII, expected base64 or %XX")
    if "%" not in text:
        return text.encode("ascii")
    if _BAD_ESCAPE.search(text):
        raise ImageError(f"{name}: a % in the data without two hexadecimal digits, expected %XX")
    # Quoted-printable has the same escapes with another sign. Its decoder needs a fixed amount of memory per character.
    # urllib's decoder makes an object for each escape: a gigabyte for an image of 20 MB.
    return binascii.a2b_qp(text.replace("=", "=3D").replace("%", "="))


def _decode_base64(text: bytes, name: str) -> bytes:
    digits = text.translate(_STANDARD_ALPHABET, _SPACES)
    body = digits.rstrip(b"=")
    num_padding = len(digits) - len(body)
    if len(body) % 4 == 1 or (num_padding and len(digits) % 4) or num_padding > 2:
        raise ImageError(_bad_base64(name, f"{len(body)} digits and {num_padding} ="))
    try:
        return binascii.a2b_base64(body + b"=" * (-len(body) % 4), strict_mode=True)
    except binascii.Error:
        raise ImageError(_bad_base64(name, "another character among the digits")) from None


def _bad_base64(name: str, reason: str) -> str:
    return f"{name}: bad base64: {reason}; expected A-Z, a-z, 0-9, + and / (or - and _), and at most two = at the end"
