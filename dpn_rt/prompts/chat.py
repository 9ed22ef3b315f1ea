"""Conversations in OpenAI's form -> prompts."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dpn_rt.errors import ImageError, RequestError
from dpn_rt.format.config import ModelConfig
from dpn_rt.prompts.image import decode_image
from dpn_rt.prompts.prompt import check_num_images
from dpn_rt.prompts.tokenizer import IMAGE_TEXT, Tokenizer

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text or a list of parts}."""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_END = "</s>"
_ROLES = ("system", "user", "assistant")
_PARTS = (
    '{"type": "text", "text": ...}, {"type": "image", "image": ...} or {"type": "image_url", "image_url": {"url": ...}}'
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: its text, and whether it has the image."""

    role: str
    text: str
    has_image: bool


def chat_prompt(
    messages: Sequence[Message], model: ModelConfig, tokenizer: Tokenizer, max_images: int
) -> dict[str, Any]:
    """The prompt of a conversation, ready for the assistant's answer.

    For models that use the router token, every user turn ends with it, from the turn with the image on: routers read
    what was asked about the image, and a router token before the image would be an error.

    Raises:
        RequestError: a message has the wrong form; ImageError: an image has, or there are more than `max_images`.
    """
    turns, images = _parse(messages, max_images)
    turns = _with_router_token(turns, model, tokenizer)
    if model.prompt.template == "tokenizer" and tokenizer.chat_template:
        text = _tokenizer_template(turns, tokenizer)
    else:
        text = _vicuna(turns)
    return {
        "prompt": text,
        **({"multi_modal_data": {"image": images if len(images) > 1 else images[0]}} if images else {}),
    }


def _parse(messages: Sequence[Message], max_images: int) -> tuple[list[Turn], list[Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages: expected a list of messages, got {messages!r:.80}")
    turns: list[Turn] = []
    images: list[Any] = []
    for position, message in enumerate(messages):
        name = f"messages[{position}]"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RequestError(f'{name}: expected a dict with "role" and "content", got {message!r:.80}')
        role = message["role"]
        if role not in _ROLES or (role == "system" and position > 0):
            raise RequestError(f"{name}: role {role!r}, expected user or assistant (or system, first)")
        text, found = _content(message["content"], name)
        if found and role != "user":
            raise ImageError(f"{name}: an image in a message of role {role}, expected it in one of role user")
        images += found
        turns.append(Turn(role, text, bool(found)))
    if turns[-1].role != "user":
        raise RequestError(f"messages: the last one has role {turns[-1].role}, expected user")
    if not turns[-1].text.strip() and not turns[-1].has_image:
        raise RequestError(f"messages[{len(turns) - 1}]: empty, expected a question or an image")
    check_num_images(len(images), max_images, f"messages: got {len(images)} images")
    return turns, images


def _content(content: Any, name: str) -> tuple[str, list[Any]]:
    """The text and the images of a message."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence):
        raise RequestError(f"{name}: content is {type(content).__name__}, expected a string or a list of parts")
    texts, images = [], []
    for position, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and part.get("image") is not None:
            images.append(part["image"])
        elif kind == "image_url":
            url = part.get("image_url")
            images.append(
                _image_of_url(url.get("url") if isinstance(url, Mapping) else url, f"{name}.content[{position}]")
            )
        else:
            raise RequestError(f"{name}.content[{position}]: expected {_PARTS}, got {part!r:.80}")
    return "\n".join(texts), images


def _image_of_url(url: Any, name: str) -> Image.Image:
    """The image in a data URL. Other URLs are not fetched."""
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ImageError(f"{name}: url {url!r:.60} is not fetched, expected a data: URL with base64 data")
    header, _, data = url.partition(",")
    if not header.endswith(";base64"):
        raise ImageError(f"{name}: url {header!r:.60}, expected data:image/...;base64,...")
    try:
        return decode_image(io.BytesIO(base64.b64decode(data, validate=True)), f"{name}: image of the data URL")
    except binascii.Error as error:
        raise ImageError(f"{name}: the data URL's base64 data is damaged: {error}") from error


def _with_router_token(turns: list[Turn], model: ModelConfig, tokenizer: Tokenizer) -> list[Turn]:
    """Turns with the router token where `chat_prompt` says; unchanged without an image or a router token."""
    router_id = model.prompt.router_token_id
    router = None if router_id is None else tokenizer.token(router_id)
    first = next((i for i, turn in enumerate(turns) if turn.has_image), None)
    if first is None or router is None or not model.reduction.use_router_token:
        return turns
    return [
        Turn(turn.role, turn.text + router, turn.has_image)
        if turn.role == "user" and i >= first and not turn.text.endswith(router)
        else turn
        for i, turn in enumerate(turns)
    ]


def _with_placeholder(turn: Turn) -> str:
    """The turn's text, after the placeholder of its image. A text that has the placeholder stays as it is."""
    return f"{IMAGE_TEXT}\n{turn.text}" if turn.has_image and IMAGE_TEXT not in turn.text else turn.text


def _vicuna(turns: list[Turn]) -> str:
    system, turns = (turns[0].text, turns[1:]) if turns[0].role == "system" else (VICUNA_SYSTEM, turns)
    text = system
    for turn in turns:
        if turn.role == "user":
            gap = "" if text.endswith(_END) else " "
            text += f"{gap}USER: {_with_placeholder(turn)}"
        else:
            text += f" ASSISTANT: {turn.text}{_END}"
    return text + " ASSISTANT:"


def _tokenizer_template(turns: list[Turn], tokenizer: Tokenizer) -> str:
    """The prompt by the tokenizer's own template, which takes contents either as lists of parts or as strings."""
    takes_parts = any(f"{quote}type{quote}" in (tokenizer.chat_template or "") for quote in "'\"")
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if takes_parts:
            image: list[dict[str, str]] = [{"type": "image"}] if turn.has_image and IMAGE_TEXT not in turn.text else []
            messages.append({"role": turn.role, "content": [*image, {"type": "text", "text": turn.text}]})
        else:
            messages.append({"role": turn.role, "content": _with_placeholder(turn)})
    try:
        return tokenizer.apply_chat_template(messages)
    except Exception as error:  # a template may raise anything, errors of jinja2 included
        raise RequestError(f"messages do not suit the model's chat template: {error}") from error
