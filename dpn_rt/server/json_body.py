"""What a JSON body may hold, counted before it is parsed: values cost far more memory and time than their bytes."""

from __future__ import annotations

import re
from typing import Any

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
}
"""How often a body may have a character, and what it usually stands for. Text may have them as well, as code does."""
PIECE = 2**20
"""Bytes that are counted at once. Between two pieces other threads run, such as the event loop."""


def check_json(body: bytes) -> None:
    """Refuses a body with more values than any request has. Its cost is that of reading the bytes a few times.

    Raises:
        HttpError: 400, with what there is too much of.
    """
    counts = dict.fromkeys(MAX_MARKS, 0)
    for start in range(0, len(body), PIECE):
        for mark, (most, name) in MAX_MARKS.items():
            counts[mark] += body.count(mark, start, start + PIECE)
            if counts[mark] > most:
                raise HttpError(
                    400,
                    f"the body has more than {most} {name}: expected at most {MAX_PROMPTS} prompts, messages or parts "
                    f"of a message, and at most {MAX_TOKEN_IDS} token ids",
                )
    if counts[b":"] > MAX_KEYS:
        _check_keys(body)


def _check_keys(body: bytes) -> None:
    try:
        left: list[Any] = [from_json(body, allow_inf_nan=False)]
    except ValueError as error:
        place = re.search(r"line \d+ column \d+", str(error))
        where = f" at {place[0]}" if place else ""
        raise HttpError(400, f"body: not valid JSON{where}, expected an object with the request's fields") from error
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if len(value) > MAX_KEYS:
                raise HttpError(400, f"an object with {len(value)} keys: expected at most {MAX_KEYS}")
            left.extend(item for item in value.values() if isinstance(item, list | dict))
        else:
            left.extend(item for item in value if isinstance(item, list | dict))
