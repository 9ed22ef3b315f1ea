"""`data:` URLs (RFC 2397) -> bytes. Their size is checked before they are decoded."""

from __future__ import annotations

import binascii
import re

from dpn_rt.server.media.policy import MediaError, MediaTooLargeError, shorten

_IMAGE_TYPE = re.compile(r"(image/[\w.+-]+|application/octet-stream)?", re.ASCII | re.IGNORECASE)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of `data:[media type][;parameter=value...][;base64],data`.

    Base64 must use the standard alphabet with padding and without line breaks. Without `;base64` the data are the
    characters of the URL, with `%XX` escapes.

    Raises:
        MediaError: there is no comma, the media type is not an image's, or the text is not in the encoding it claims.
        MediaTooLargeError: more than `max_bytes`, where possible by the length of the text, so before decoding.
    """
    name = f"image {shorten(url)}"
    header, comma, text = url[len("data:") :].partition(",")
    if not comma:
        raise MediaError(f"{name}: no comma, expected 'data:image/png;base64,' and the data")
    media_type, *parameters = header.split(";")
    if not _IMAGE_TYPE.fullmatch(media_type):
        raise MediaError(f"{name}: expected the media type image/*, application/octet-stream or none")
    is_base64 = bool(parameters) and parameters[-1].lower() == "base64"
    num_characters = len(text) - 2 * text.count("%")
    _check_size(name, num_characters // 4 * 3 - 2 if is_base64 else num_characters, max_bytes)
    data = _decode_base64(_unescape(text, name), name) if is_base64 else _unescape(text, name)
    _check_size(name, len(data), max_bytes)
    return data


def _check_size(name: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise MediaTooLargeError(f"{name}: {num_bytes} bytes, expected at most {max_bytes}")


def _unescape(text: str, name: str) -> bytes:
    if not (text.isascii() and text.isprintable()):
        raise MediaError(f"{name}: line breaks or characters outside of ASCII, expected base64 or %XX")
    if "%" not in text:
        return text.encode("ascii")
    if _BAD_ESCAPE.search(text):
        raise MediaError(f"{name}: a % in the data without two hexadecimal digits, expected %XX")
    # Quoted-printable has the same escapes with another sign. Its decoder needs a fixed amount of memory per character.
    # urllib's decoder makes an object for each escape: a gigabyte for an image of 20 MB.
    return binascii.a2b_qp(text.replace("=", "=3D").replace("%", "="))


def _decode_base64(text: bytes, name: str) -> bytes:
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as error:
        raise MediaError(_bad_base64(name, str(error))) from error
    # Some versions of Python accept excess padding.
    if len(data) != len(text) // 4 * 3 - text[-2:].count(b"="):
        raise MediaError(_bad_base64(name, "Excess padding"))
    return data


def _bad_base64(name: str, reason: str) -> str:
    return f"{name}: bad base64: {reason}; expected the standard alphabet (+ and /), padded with = to fours"
