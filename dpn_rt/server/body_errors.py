"""What is wrong with a request's body, in the server's own words: those of pydantic name classes of the server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

SHOWN_LENGTH = 40
"""Characters of a value in a message."""
_KINDS = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
Error = Mapping[str, Any]


class FieldError(ValueError):
    """One of the protocol's own checks of an object has failed, because of this field of it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def describe(error: ValidationError) -> tuple[str | None, str]:
    """The field that is wrong, as `messages.0.role` (None: the body as a whole), and a message that begins with it.

    A message never has text of prompts or images: of a string it shows only that it is one.
    """
    errors = error.errors(include_url=False)
    # Where a value may have several forms, pydantic reports an error for each. The deepest location belongs to the
    # form that was meant; a value of the wrong type belongs to a form that was not.
    first = max(errors, key=lambda item: (len(item["loc"]), item["type"] not in _KINDS))
    place = _place(_location(first))
    if first["type"] == "extra_forbidden":
        return place, f"unknown or unsupported field {place}: expected fields of OpenAI's API, vLLM's or our own"
    kinds = [_KINDS[item["type"]] for item in errors if item["type"] in _KINDS and _place(item["loc"]) == place]
    return place, f"{place or 'body'}: {_fault(first, kinds)}"


def _fault(error: Error, kinds: Sequence[str]) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind in _KINDS:
        return f"expected {' or '.join(dict.fromkeys(kinds))}, got {_shown(value)}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{_shown(value)}, expected {words} {context[bound]}"
    match kind:
        case "value_error":  # of the protocol's own checks
            return str(context["error"])
        case "missing":
            return "missing, expected it in the request"
        case "literal_error":
            return f"{_quoted(value)}, expected {context['expected']}"
        case "union_tag_invalid":
            return f"type {_quoted(value['type'])}, expected one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f'expected an object with a "type", got {_shown(value)}'
        case "string_too_long":
            return f"{len(value)} characters, expected at most {context['max_length']}"
        case "too_short":
            return f"{len(value)} items, expected at least {context['min_length']}"
        case "too_long":
            return f"{len(value)} items, expected at most {context['max_length']}"
        case _:
            return f"got {_shown(value)}, which is not accepted here"


def _location(error: Error) -> Sequence[int | str]:
    own = error.get("ctx", {}).get("error")
    return (*error["loc"], own.field) if isinstance(own, FieldError) else error["loc"]


def _place(location: Sequence[int | str]) -> str | None:
    """A location without pydantic's names for one of several types of a field."""
    parts = []
    for index, part in enumerate(location):
        is_tag = index > 1 and str(location[index - 2]).startswith("list[tagged-union")
        if not is_tag and not _is_form(part):
            parts.append(_name(str(part)))
    return ".".join(parts) or None


def _name(field: str) -> str:
    """A field's name, which a client may have chosen: cut, and without line breaks, since it is logged."""
    field = field[: SHOWN_LENGTH + 1]  # of millions of characters perhaps
    shown = field if field.isprintable() else repr(field)
    return shown if len(shown) <= SHOWN_LENGTH else f"{shown[: SHOWN_LENGTH - 1]}…"


def _is_form(part: int | str) -> bool:
    return isinstance(part, str) and (
        "[" in part or part in ("str", "constrained-str", "int", "float", "bool", "ImageUrl")
    )


def _shown(value: Any) -> str:
    if isinstance(value, str | bytes):
        return "a string"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else json.dumps(value)[:SHOWN_LENGTH]


def _quoted(value: Any) -> str:
    return f"{value[:SHOWN_LENGTH]!r:.{SHOWN_LENGTH}}" if isinstance(value, str) else _shown(value)
