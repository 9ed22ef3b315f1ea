"""Which texts can be encoded as UTF-8, and how values are shown in error messages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dpn_rt.errors import RequestError

MAX_SHOWN = 200
"""Characters of a value in an error message."""
MAX_ITEMS = 40
"""Items of a list in an error message."""
_MAX_DEPTH = 8
"""Lists in lists whose items are looked at."""


def check_unicode(text: str, name: str, *, field: str | None = None) -> None:
    """Refuses a text with half of a surrogate pair, as broken JSON escapes or undecodable bytes leave it.

    Args:
        text: any string.
        name: of the text, for the message.
        field: of the request, for the error.

    Raises:
        RequestError: with the position and the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name}: character {error.start} is U+{ord(text[error.start]):04X}, half of a surrogate pair: "
            "expected text that can be encoded as UTF-8",
            field=field,
        ) from None


def is_text(value: str | Path) -> bool:
    """Whether a string or a file's name can be encoded as UTF-8."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """A value in an error message: as Python writes it, cut where it is long, with the types of objects for objects."""
    if isinstance(value, str | bytes | list | tuple) and len(value) > MAX_SHOWN:
        value = value[: MAX_SHOWN + 1]  # first, since a value may have millions of items
    text = repr(_without_addresses(value, _MAX_DEPTH))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


class _TypeName:
    """Stands for an object that would be written with its address in memory, which tells a reader nothing."""

    def __init__(self, value: object) -> None:
        self._name = type(value).__name__

    def __repr__(self) -> str:
        return self._name


def _without_addresses(value: object, depth: int) -> object:
    kind: Any = type(value)
    if depth and isinstance(value, list | tuple | set | frozenset) and kind in (list, tuple, set, frozenset):
        return kind([_without_addresses(item, depth - 1) for item in islice(value, MAX_SHOWN + 1)])
    if depth and isinstance(value, dict) and kind is dict:
        pairs = islice(value.items(), MAX_SHOWN + 1)
        return {_without_addresses(key, depth - 1): _without_addresses(item, depth - 1) for key, item in pairs}
    if isinstance(value, str | bytes | int | float | None):
        return value
    return _TypeName(value) if " at 0x" in repr(value) else value


def few(items: Sequence[str], separator: str = ", ") -> str:
    """Items in an error message: all of them, or the first ones and how many more there are."""
    listed = [item if len(item) <= MAX_SHOWN else f"{item[: MAX_SHOWN - 3]}..." for item in items[:MAX_ITEMS]]
    more = len(items) - MAX_ITEMS
    return separator.join(listed) + (f"{separator}and {more:,} more" if more > 0 else "")
