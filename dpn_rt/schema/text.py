"""Texts that callers hold but that no tokenizer takes."""

from __future__ import annotations

from pathlib import Path

from dpn_rt.errors import RequestError


def check_unicode(text: str, name: str) -> None:
    """Refuses a text with half of a surrogate pair, as broken JSON escapes or undecodable bytes leave it.

    Args:
        text: any string.
        name: of the text, for the message.

    Raises:
        RequestError: with the position and the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name}: character {error.start} is U+{ord(text[error.start]):04X}, half of a surrogate pair: "
            "expected text that can be encoded as UTF-8"
        ) from None


def is_text(value: str | Path) -> bool:
    """Whether a string or a file's name can be encoded as UTF-8."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True
