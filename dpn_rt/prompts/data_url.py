"""`data:` URLs (RFC 2397) -> bytes. Their size is checked before they are decoded."""

from __future__ import annotations

import binascii
import io
import re
from collections.abc import Iterable, Iterator

from dpn_rt.errors import ImageError

SHOWN_LENGTH = 80
"""Approximate length of a URL in a message, in characters."""
MOST_SEARCHED = 2**13
"""Characters. The rest of a longer URL, which none may be, is not looked at for a message."""
MOST_HEADER = 2**12
"""Characters before the comma of a data URL."""
PIECE = 2**18
"""Characters that are read at once. Python's lock is free between two pieces only."""
MOST_KEPT = 2**20
"""Digits that are kept because there was a =, after which there can be no more than another one."""
_IMAGE_TYPE = re.compile(r"(image/[\w.+-]+|application/octet-stream)?", re.ASCII | re.IGNORECASE)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PLAIN = bytes(range(ord("!"), ord("~") + 1)).replace(b"%", b"")
"""Characters that stand for themselves."""
_SPACES = b" \t\r\n\f\v"
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,20}:", re.IGNORECASE)
_ENCODED = re.compile(r"[A-Za-z0-9+/=_\s-]{80}", re.ASCII)
"""Longer than any part of a path without a dot, but shorter than an image in base64."""
_JPEG = "/9j/"
"""As a JPEG in base64 begins: like a path."""
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")


class DataUrlTooLargeError(ImageError):
    """A data URL has more bytes than its reader takes."""


def is_data_url(url: str) -> bool:
    """Whether `url` has the scheme `data:`."""
    return url[:5].lower() == "data:"


def has_scheme(url: str) -> bool:
    """Whether there is a colon where a URL could have one. Base64 has none."""
    return ":" in url[:MOST_SEARCHED]


def is_encoded(text: str) -> bool:
    """Whether a text looks like base64 rather than like a path or a URL."""
    is_path = text.startswith(("/", "~", "\\")) or text[1:2] == ":"
    return text.startswith(_JPEG) or (not is_path and _ENCODED.match(text) is not None)


def stripped(url: str) -> str:
    """`url` without white space around it, which browsers ignore as well."""
    return url.strip(_SPACES.decode())


def shorten(url: str) -> str:
    """`url` for messages: quoted, cut, and without parts that may be secret (data, user and password, query)."""
    if is_data_url(url[:SHOWN_LENGTH].lstrip()):
        shown = f"{url[: min(url.index(','), SHOWN_LENGTH - 2)]},…" if "," in url else "data:…"
    elif not has_scheme(url) and (not url.startswith("/") or is_encoded(url)):
        return f"of {len(url)} characters without a scheme"
    elif (scheme := _SCHEME.match(url)) and not url.startswith(("/", "\\"), scheme.end()):
        shown = f"{scheme[0]}…"  # data may follow, as in base64:iVBORw0KGgo
    else:
        # Cut to its length last: a cut before the "@" would leave the password.
        is_long = len(url) > MOST_SEARCHED
        shown = re.sub(r"([?#]|base64,).*", "…", url[:MOST_SEARCHED], flags=re.DOTALL)
        shown = re.sub(r"//[^/?#]*(@|\Z)" if is_long else r"//[^/?#]*@", "//…@", shown)
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
    comma = url.find(",")
    if comma < 0:
        raise ImageError(f"{name}: no comma, expected 'data:image/png;base64,' and the data")
    if comma > MOST_HEADER:
        raise ImageError(f"{name}: {comma} characters before the comma, expected at most {MOST_HEADER}")
    media_type, *parameters = url[len("data:") : comma].split(";")
    if not _IMAGE_TYPE.fullmatch(media_type):
        raise ImageError(f"{name}: expected the media type image/*, application/octet-stream or none")
    start = comma + 1
    is_base64 = bool(parameters) and parameters[-1].strip(" ").lower() == "base64"
    fewest = _fewest_base64_bytes if is_base64 else _fewest_bytes
    _check_size(name, fewest(url, start, max_bytes), max_bytes)
    data = io.BytesIO()
    pieces = _unescaped(url, start, name, skips_spaces=is_base64)
    if is_base64:
        _write_base64(data, pieces, name)
    else:
        data.writelines(pieces)
    _check_size(name, data.tell(), max_bytes)
    return data.getvalue()


def _fewest_bytes(url: str, start: int, enough: int) -> int:
    """Bytes that the text from `start` on stands for if every % begins an escape. Counted only if it may be more than
    `enough`."""
    length = len(url) - start
    return length - 2 * _count(url, start, "%") if length > enough else 0


def _fewest_base64_bytes(url: str, start: int, enough: int) -> int:
    """The same for base64, if all that may be a line break, an escape or padding is."""
    length = len(url) - start
    if length * 3 // 4 - 2 <= enough:
        return 0
    num_spaces = sum(_count(url, start, space) for space in _SPACES.decode())
    return max(0, (length - num_spaces - 3 * _count(url, start, "%")) * 3 // 4 - 2)


def _count(url: str, start: int, character: str) -> int:
    return sum(url.count(character, place, place + PIECE) for place in range(start, len(url), PIECE))


def _check_size(name: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise DataUrlTooLargeError(f"{name}: {num_bytes} bytes, expected at most {max_bytes}")


def _unescaped(url: str, start: int, name: str, *, skips_spaces: bool) -> Iterator[bytes]:
    """The text from `start` on in pieces, without its escapes, of which one may stand in two pieces. Between two pieces
    other threads run, such as a server's event loop."""
    rest = ""
    for place in range(start, len(url), PIECE):
        piece = url[place : place + PIECE]
        if not rest and piece.isascii() and not piece.encode("ascii").translate(None, _PLAIN):
            yield piece.encode("ascii")
            continue
        text = rest + ("".join(piece.split()) if skips_spaces else piece)
        percent = text.find("%", max(0, len(text) - 2))
        end = percent if percent >= 0 else len(text)
        rest = text[end:]
        yield _unescape(text[:end], name)
    yield _unescape(rest, name)


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


def _write_base64(data: io.BytesIO, pieces: Iterable[bytes], name: str) -> None:
    digits = bytearray()
    """Those that are not decoded yet. From the first = on they are kept: only the end of all may have some."""
    for piece in pieces:
        digits += piece.translate(_STANDARD_ALPHABET, _SPACES)
        if b"=" not in digits:
            whole = len(digits) - len(digits) % 4
            data.write(_decoded(digits[:whole], name))
            del digits[:whole]
        elif len(digits) > MOST_KEPT:
            raise ImageError(_bad_base64(name, "an = long before the end"))
    body = digits.rstrip(b"=")
    num_padding = len(digits) - len(body)
    if len(body) % 4 == 1 or (num_padding and len(digits) % 4) or num_padding > 2:
        num_digits = data.tell() // 3 * 4 + len(body)
        raise ImageError(_bad_base64(name, f"{num_digits} digits and {num_padding} ="))
    data.write(_decoded(body + b"=" * (-len(body) % 4), name))


def _decoded(digits: bytearray, name: str) -> bytes:
    try:
        return binascii.a2b_base64(digits, strict_mode=True)
    except binascii.Error:
        raise ImageError(_bad_base64(name, "another character among the digits")) from None


def _bad_base64(name: str, reason: str) -> str:
    return f"{name}: bad base64: {reason}; expected A-Z, a-z, 0-9, + and / (or - and _), and at most two = at the end"
