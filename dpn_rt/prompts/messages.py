"""Conversations in OpenAI's form -> turns, the same for Python and HTTP."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from PIL import Image

from dpn_rt.errors import ImageError, RequestError
from dpn_rt.prompts.data_url import decode_data_url, is_data_url, shorten, stripped
from dpn_rt.prompts.image import decode_image
from dpn_rt.schema.text import check_unicode, shown

Message = Mapping[str, Any]
"""{"role": "system" | "developer" | "user" | "assistant", "content": text, or a list of parts}."""

MAX_DATA_URL_BYTES = 2**28
"""Of an image in a data URL, where the caller sets no limit."""
_ROLES = ("system", "user", "assistant")
_PARTS = (
    '{"type": "text", "text": ...}, {"type": "image", "image": ...} or {"type": "image_url", "image_url": {"url": ...}}'
)
_IMAGE_KEYS = (("image", "image"), ("image", "path"), ("image_pil", "image_pil"))
"""Types of parts, and what an image or the name of its file is called there: our own, transformers' and vLLM's."""
_URL_KEYS = (("image_url", "image_url"), ("image", "url"))
"""The same for URLs."""


class Marker(Enum):
    """What stands in a turn besides text. It is never confused with the same characters in a text."""

    IMAGE = "image"
    ROUTER = "router"


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: str
    parts: tuple[str | Marker, ...]
    """Texts and images in the order of the message."""

    @property
    def has_image(self) -> bool:
        return Marker.IMAGE in self.parts

    @property
    def is_blank(self) -> bool:
        """Whether there is neither an image nor a visible character."""
        return not any(part.strip() if isinstance(part, str) else True for part in self.parts)


def parse_messages(messages: Sequence[Message]) -> tuple[list[Turn], list[Any]]:
    """The turns of a conversation, and its images in their order.

    System and developer messages that follow each other become one system turn.

    Raises:
        RequestError: a message has the wrong form; ImageError: an image has.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages: expected a list of messages, got {shown(messages)}", field="messages")
    turns: list[Turn] = []
    images: list[Any] = []
    for position, message in enumerate(messages):
        name = f"messages[{position}]"
        if not isinstance(message, Mapping) or "role" not in message or not _has_content(message):
            raise RequestError(f'{name}: expected a dict with "role" and "content", got {shown(message)}', field=name)
        role = "system" if message["role"] == "developer" else message["role"]
        if role not in _ROLES:
            raise RequestError(f"{name}: role {shown(message['role'])}, expected system, user or assistant", field=name)
        parts, found = _content(message.get("content"), role, name)
        if found and role != "user":
            raise ImageError(f"{name}: an image in a message of role {role}, expected it in one of role user")
        images += found
        if role == "system" and turns and turns[-1].role == "system":
            turns[-1] = Turn("system", (*turns[-1].parts, "\n", *parts))
        else:
            turns.append(Turn(role, parts))
    return turns, images


def _has_content(message: Message) -> bool:
    """Of an assistant's message it may be left out."""
    return "content" in message or message["role"] == "assistant"


def _content(content: Any, role: str, name: str) -> tuple[tuple[str | Marker, ...], list[Any]]:
    """The parts of a message, and its images."""
    if content is None and role == "assistant":
        return (), []
    if isinstance(content, str):
        check_unicode(content, name, field=name)
        return (content,), []
    if not isinstance(content, Sequence):
        raise RequestError(
            f"{name}: content is {type(content).__name__}, expected a string or a list of parts", field=name
        )
    parts: list[str | Marker] = []
    images: list[Any] = []
    for position, part in enumerate(content):
        place = f"{name}.content[{position}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if (kind == "text" or (kind == "refusal" and role == "assistant")) and isinstance(part.get(kind), str):
            check_unicode(part[kind], place, field=place)
            parts.append(part[kind])
        elif (image := _value(part, _IMAGE_KEYS)) is not None:
            parts.append(Marker.IMAGE)
            images.append(image)
        elif (url := _value(part, _URL_KEYS)) is not None or kind == "image_url":
            url = url.get("url") if isinstance(url, Mapping) else url
            parts.append(Marker.IMAGE)
            images.append(_image_of_url(url, place))
        else:
            raise RequestError(f"{place}: expected {_PARTS}, got {shown(part)}", field=place)
    return tuple(parts), images


def _value(part: Any, keys: Sequence[tuple[str, str]]) -> Any:
    """The value of a part by the first of some (type, key) that it has; None where it has none of them."""
    if not isinstance(part, Mapping):
        return None
    return next((part[key] for kind, key in keys if part.get("type") == kind and part.get(key) is not None), None)


def _image_of_url(url: Any, name: str) -> Image.Image:
    """The image in a data URL. Other URLs are not fetched."""
    url = stripped(url) if isinstance(url, str) else url
    if not isinstance(url, str) or not is_data_url(url):
        shown = shorten(url) if isinstance(url, str) else type(url).__name__
        raise ImageError(f"{name}: url {shown} is not fetched, expected data:image/png;base64, and the data")
    return decode_image(io.BytesIO(decode_data_url(url, MAX_DATA_URL_BYTES)), f"{name}: image of the data URL")
