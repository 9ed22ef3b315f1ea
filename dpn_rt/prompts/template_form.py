"""How a chat template takes what messages say: as strings or as lists of parts, with which part for an image.

Templates are programs, so the form that suits one is found by rendering a conversation in each.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpn_rt.prompts.markers import IMAGE_TEXT
from dpn_rt.prompts.messages import Marker, Turn

ImagePart = Literal["type", "image", "image_url"]
"""Of an image: its type alone, as transformers' processors have it; with an `image` too; OpenAI's part."""
Marks = Mapping[Marker, str]
"""What stands in texts for images and router tokens."""


@dataclass(frozen=True)
class ContentForm:
    """How contents are handed to a template."""

    roles_with_parts: frozenset[str]
    """Roles whose contents are lists of parts; those of others are strings."""
    image_part: ImagePart = "type"
    has_stand_ins: bool = False
    """Whether single characters stand for images and router tokens while a template is rendered: for one that would
    change their letters or leave them out."""

    def message(self, turn: Turn, marks: Marks) -> dict[str, Any]:
        """A turn as the template takes it."""
        if turn.role not in self.roles_with_parts:
            content = images_first(turn, marks) if turn.has_image else written(turn, marks)
            return {"role": turn.role, "content": content}
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            if part is Marker.IMAGE:
                parts.append(self._image(marks[part]))
            elif isinstance(part, str):
                parts.append({"type": "text", "text": part})
            elif parts and parts[-1]["type"] == "text":  # templates may write something after each text
                parts[-1]["text"] += marks[part]
            else:
                parts.append({"type": "text", "text": marks[part]})
        return {"role": turn.role, "content": parts}

    def _image(self, mark: str) -> dict[str, Any]:
        """A part whose value is the mark: a template may write it."""
        if self.image_part == "image_url":
            return {"type": "image_url", "image_url": {"url": mark}}
        return {"type": "image"} if self.image_part == "type" else {"type": "image", "image": mark}


def content_forms() -> Iterator[ContentForm]:
    """In the order in which they are tried: lists of parts say more than strings."""
    image_parts: tuple[ImagePart, ...] = ("type", "image", "image_url")
    for has_stand_ins in (False, True):
        for roles in _subsets(("user", "assistant")):
            for image_part in image_parts if "user" in roles else image_parts[:1]:
                yield ContentForm(roles, image_part, has_stand_ins)


def written(turn: Turn, marks: Marks) -> str:
    """The parts of a turn in their order, with nothing between them."""
    return "".join(part if isinstance(part, str) else marks[part] for part in turn.parts)


def images_first(turn: Turn, marks: Marks) -> str:
    """A turn as LLaVA writes it: images, each on a line of its own, and then the text.

    A turn whose images stand between texts keeps their places.
    """
    places = [i for i, part in enumerate(turn.parts) if part is Marker.IMAGE]
    texts = [i for i, part in enumerate(turn.parts) if isinstance(part, str) and part]
    if not places or (texts and texts[0] < places[-1] and places[0] < texts[-1]):
        return written(turn, marks)
    others = tuple(part for part in turn.parts if part is not Marker.IMAGE)
    return f"{marks[Marker.IMAGE]}\n" * len(places) + written(Turn(turn.role, others), marks)


LEFT_OUT = "leaves out what messages say"
_PRINTED_PART = re.compile(r"type['\"&][^a-z]*(text|image)")
"""A list of parts as Python or JSON, also with quotes escaped, in small letters."""


def problem_of_words(words: Sequence[str], text: str) -> str | None:
    """What is wrong with a prompt in which each word should stand once, one after the other, in small letters or
    capitals, and no list of parts as Python or JSON; None where nothing is."""
    letters = text.lower()
    places, counts = zip(*((letters.find(word.lower()), letters.count(word.lower())) for word in words), strict=True)
    if 0 in counts or _PRINTED_PART.search(letters):
        return LEFT_OUT
    if max(counts) > 1:
        return f"writes a message {max(counts)} times, expected once"
    return None if list(places) == sorted(places) else "writes messages in another order"


def problem_of_marks(text: str, image_token: str | None, router: str, num_images: int) -> str | None:
    """What is wrong with a prompt in which one router token should stand, and a placeholder for each of 0 or 1 images;
    None where nothing is.

    A template may repeat the tokenizer's image token for each row of an image. Two are one too many.
    """
    if text.count(router) != 1:
        return "changes router tokens in messages, or leaves them out"
    token = image_token or IMAGE_TEXT
    runs = [len(run) // len(token) for run in re.findall(f"(?:{re.escape(token)})+", text.replace(IMAGE_TEXT, token))]
    is_repeated = num_images == len(runs) == 1 and runs[0] > 2 and image_token is not None
    if sum(runs) == num_images or is_repeated:
        return None
    expected = IMAGE_TEXT if token == IMAGE_TEXT else f"{IMAGE_TEXT} or {token}"
    expected = f"one image, expected one: {expected}" if num_images else "no image, expected none"
    return f"writes {sum(runs)} placeholders for {expected}"


def _subsets(roles: tuple[str, ...]) -> list[frozenset[str]]:
    """Largest first."""
    counts = range(len(roles), -1, -1)
    return [frozenset(subset) for count in counts for subset in itertools.combinations(roles, count)]
