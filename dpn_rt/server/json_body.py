"""Bodies in JSON. What one holds is counted before it is parsed: values cost far more memory and time than bytes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from dpn_rt.server.errors import HttpError

MAX_PROMPTS = 4096
"""Items of a list that are not numbers, such as prompts, messages and parts of a message."""
MAX_TOKEN_IDS = 2**20
MAX_KEYS = 256
"""Of one object. Requests have about a hundred fields."""
MAX_MARKS = {
    b",": (MAX_TOKEN_IDS + 2**16, "commas"),
    b'"': (2**18, "quotation marks"),
    b"[": (2**16, "lists"),
    b"{": (2**16, "objects"),
    b":": (2**16, "keys"),
    b"\\": (2**20, "escapes"),
}
"""How often a body may have a character, and what it usually stands for. Text may have them as well, as code does."""
MAX_TEXT_BYTES = 10 * 2**20
"""Of a body, its data URLs apart. Ids take up to eight each; a text of so many bytes has more tokens than any model
reads. The parser keeps Python's lock while it reads them, for some tens of milliseconds."""
PIECE = 2**16
"""Bytes that are counted at once."""
_DATA_URL = re.compile(rb'"(?: |\\[fnrt]){0,16}data:')
_OUTSIDE_ASCII = re.compile(rb"\\u(?!00[0-7])[0-9a-fA-F]{4}")
Bytes = bytes | bytearray


def read_json(body: Bytes) -> Any:
    """The value of a body.

    Raises:
        HttpError: 400, it is no JSON, or has more values than any request.
    """
    counts = check_json(body)
    try:
        value = from_json(body)
    except ValueError as error:
        place = re.search(r"line \d+ column \d+", str(error))
        where = f" at {place[0]}" if place else ""
        raise HttpError(400, f"body: not valid JSON{where}, expected an object with the request's fields") from None
    if counts[b":"] > MAX_KEYS:
        _check_keys(value)
    return value


def check_json(body: Bytes) -> dict[bytes, int]:
    """Refuses a body with more values than any request has. Other threads run meanwhile.

    Returns:
        How often it has each of `MAX_MARKS`.

    Raises:
        HttpError: 400, with what there is too much of.
    """
    counts = dict.fromkeys(MAX_MARKS, 0)
    characters = np.frombuffer(body, np.uint8)
    for start in range(0, len(body), PIECE):
        piece = characters[start : start + PIECE]
        for mark, (most, name) in MAX_MARKS.items():
            counts[mark] += int(np.count_nonzero(piece == ord(mark)))
            if counts[mark] > most:
                raise HttpError(
                    400,
                    f"the body has more than {most} {name}: expected at most {MAX_PROMPTS} prompts, messages or parts "
                    f"of a message, and at most {MAX_TOKEN_IDS} token ids",
                )
    if len(body) > MAX_TEXT_BYTES and (text_bytes := _count_text(body, characters)) > MAX_TEXT_BYTES:
        raise HttpError(400, f"the body has {text_bytes} bytes beside data URLs: expected at most {MAX_TEXT_BYTES}")
    return counts


def _count_text(body: Bytes, characters: npt.NDArray[np.uint8]) -> int:
    """Bytes that do not belong to a long data URL."""
    starts = range(0, len(body), PIECE)
    quotes = np.concatenate([start + np.flatnonzero(characters[start : start + PIECE] == ord('"')) for start in starts])
    lengths = np.diff(quotes, append=len(body))
    long = lengths > PIECE
    strings: list[tuple[int, int]] = list(zip(quotes[long].tolist(), lengths[long].tolist(), strict=True))
    return len(body) - sum(length for start, length in strings if _is_data_url(body, start, start + length))


def _is_data_url(body: Bytes, start: int, end: int) -> bool:
    """Whether a string is one, in ASCII alone: with one other character it would need four times the memory."""
    return _DATA_URL.match(body, start) is not None and all(
        body[place : place + PIECE].isascii() and not _OUTSIDE_ASCII.search(body, place, place + PIECE + 5)
        for place in range(start, end, PIECE)
    )


def _check_keys(value: Any) -> None:
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if len(value) > MAX_KEYS:
                raise HttpError(400, f"an object with {len(value)} keys: expected at most {MAX_KEYS}")
            left.extend(item for item in value.values() if isinstance(item, list | dict))
        elif isinstance(value, list):
            left.extend(item for item in value if isinstance(item, list | dict))
