"""Which image a request is about: what replicas are chosen by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from dpn_rt.server.errors import HttpError
from dpn_rt.server.json_body import Bytes, read_json


def image_key(body: Bytes) -> str:
    """SHA-256 of the first image of a conversation as it was sent: its data URL, or where it is fetched from.

    Of the first one alone, since later turns of a conversation may bring more images, and what is known of a prompt is
    its beginning.

    Args:
        body: of a request, in JSON.

    Returns:
        In hexadecimal; empty for a request without an image, and for a body that will be refused.
    """
    if b'"image_url"' not in body:
        return ""
    try:
        value = read_json(body)
    except HttpError:
        return ""
    for url in _urls(value):
        return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    return ""


def _urls(request: Any) -> Iterator[str]:
    """URLs of images, in the order of the messages; nothing of what has another form."""
    messages = request.get("messages") if isinstance(request, Mapping) else None
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            image = part.get("image_url") if isinstance(part, Mapping) else None
            url = image.get("url") if isinstance(image, Mapping) else image
            if isinstance(url, str):
                yield url
