"""LLaVA's conversation file -> checked conversations; images are not opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpn_rt.errors import TrainingError
from dpn_rt.prompts.markers import IMAGE_TEXT
from dpn_rt.prompts.messages import Message
from dpn_rt.schema.files import read_file
from dpn_rt.schema.text import is_text, shown

MAX_BYTES = 2**33
"""Of the file, which is read as a whole; LLaVA-1.5's mixture of 665,000 conversations has 1 GB."""
_FORM = '{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}'
_SPEAKERS = ("human", "gpt")


@dataclass(frozen=True)
class Conversation:
    """One row of the file: questions and answers that take turns, about an image or about none."""

    place: str
    """For messages, such as "item 7 (id '000033')"."""
    image: Path | None
    turns: tuple[str, ...]
    """Questions at even places, answers at odd ones; `<image>` in a question is where the image goes."""

    def messages(self) -> list[Message]:
        """The conversation as `LLM.chat` takes it; the image comes before the text of its question, as in LLaVA."""
        return [self._question(text) if i % 2 == 0 else {"role": "assistant", "content": text}
                for i, text in enumerate(self.turns)]  # fmt: skip

    def _question(self, text: str) -> Message:
        if self.image is None or IMAGE_TEXT not in text:
            return {"role": "user", "content": text}
        rest = {"type": "text", "text": text.replace(IMAGE_TEXT, "").strip()}
        return {"role": "user", "content": [{"type": "image", "image": self.image}, rest]}


@dataclass(frozen=True)
class BadRow:
    """A row that is no conversation to learn from."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def read_conversations(path: Path, image_folder: Path | None) -> tuple[list[Conversation], list[BadRow]]:
    """The conversations of a file, and the rows that are none, in the order of the file.

    Args:
        path: JSON, a list of `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`; rows without
            an image have no "image".
        image_folder: that names of images are relative to; None: the file's rows have no images.

    Raises:
        TrainingError: the file cannot be read, is not JSON, or has no list with a conversation.
    """
    values = _read_list(path)
    conversations: list[Conversation] = []
    bad_rows: list[BadRow] = []
    for number, value in enumerate(values, 1):
        place = f"item {number}"
        if isinstance(value, dict) and isinstance(value.get("id"), str | int):
            place += f" (id {shown(value['id'])})"
        try:
            conversations.append(_conversation(place, value, image_folder))
        except _BadRowError as error:
            bad_rows.append(BadRow(place, str(error)))
    if not conversations:
        first = f": {bad_rows[0]}" if bad_rows else ""
        raise TrainingError(f"{path}: none of its {len(values)} items is a conversation{first}")
    return conversations, bad_rows


class _BadRowError(Exception):
    """With the reason."""


def _read_list(path: Path) -> list[Any]:
    try:
        values = json.loads(read_file(path, TrainingError, MAX_BYTES))
    except RecursionError as error:
        raise TrainingError(f"{path}: not JSON that is read: nested too deeply") from error
    except ValueError as error:
        where = f": line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise TrainingError(f"{path}: not JSON (truncated?){where}, expected a list of {_FORM}") from error
    if not isinstance(values, list):
        raise TrainingError(f"{path}: got {type(values).__name__}, expected a list of {_FORM}")
    return values


def _conversation(place: str, value: Any, image_folder: Path | None) -> Conversation:
    if not isinstance(value, dict):
        raise _BadRowError(f"expected an object {_FORM}, got {type(value).__name__}")
    turns = _turns(value)
    image = _image(value, image_folder)
    count = sum(text.count(IMAGE_TEXT) for text in turns[::2])
    if count != (image is not None):
        expected = "one" if image is not None else 'none without "image"'
        raise _BadRowError(f"{count} {IMAGE_TEXT} in the questions, expected {expected}")
    for number, text in enumerate(turns):
        if not (text.replace(IMAGE_TEXT, "?") if number % 2 == 0 else text).strip():
            raise _BadRowError(
                f"conversations[{number}] is empty, expected {'an answer' if number % 2 else 'a question'}"
            )
    return Conversation(place, image, turns)


def _turns(value: Mapping[str, Any]) -> tuple[str, ...]:
    entries = value.get("conversations")
    if not isinstance(entries, list) or not entries:
        raise _BadRowError(f"conversations: expected a list of questions and answers, got {shown(entries)}")
    turns = []
    for number, entry in enumerate(entries):
        name, speaker = f"conversations[{number}]", _SPEAKERS[number % 2]
        if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
            raise _BadRowError(f'{name}: expected an object with "from" and a text "value", got {shown(entry)}')
        if entry.get("from") != speaker:
            raise _BadRowError(
                f'{name}: from {shown(entry.get("from"))}, expected "{speaker}": human and gpt take turns'
            )
        if not is_text(entry["value"]):
            raise _BadRowError(f"{name}: half of a surrogate pair in its text, expected text that UTF-8 can hold")
        turns.append(entry["value"])
    if len(turns) % 2:
        raise _BadRowError(f"conversations: the last of {len(turns)} is a question, expected an answer after it")
    return tuple(turns)


def _image(value: Mapping[str, Any], image_folder: Path | None) -> Path | None:
    name = value.get("image")
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise _BadRowError(f"image: expected the name of one file, got {shown(name)}")
    if image_folder is None:
        raise _BadRowError(f"image {shown(name)}: expected --image-folder, which it is in")
    path = image_folder / name
    if not _is_file(path):
        raise _BadRowError(f"image {shown(str(path))}: no such file")
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
