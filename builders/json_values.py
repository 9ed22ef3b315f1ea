"""Typed reading of values from a checkpoint's JSON files; every error names the file's key and the value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.schema.bounds import LARGEST_INT
from dpn_rt.schema.files import SETTINGS_BYTES, is_there
from dpn_rt.schema.json_text import read_json as read_any_json
from dpn_rt.schema.text import shown

MOST_COMPARED = 100
"""Characters of a value that are compared with known ones."""
T = TypeVar("T", int, float, bool, str)
Json = Mapping[str, Any]


class Section(dict[str, Any]):
    """An object of a JSON file that knows where it stands, for messages."""

    def __init__(self, values: Json, place: str) -> None:
        """Args: place: file and keys that lead to it, such as `config.json: text_config.`"""
        super().__init__(values)
        self.place = place


def name_of(values: Json, key: str) -> str:
    """A key with its file and the keys above it, such as `config.json: text_config.model_type`."""
    return f"{values.place if isinstance(values, Section) else 'config.json: '}{key}"


def read_json(path: Path) -> Section:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, no regular file or too large, or holds something other than an object.
    """
    value = read_any_json(path, CheckpointError, SETTINGS_BYTES)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return Section(value, f"{path.name}: ")


def read_json_if_there(path: Path) -> Json:
    """As `read_json`; empty where there is nothing of this name."""
    return read_json(path) if is_there(path) else {}


def json_bytes(value: Json) -> bytes:
    """A JSON file with sorted keys."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def value_of(values: Json, key: str, kind: type[T], default: T | None = None) -> T:
    """`values[key]` as `kind`; the default where the key is absent or null.

    Raises:
        ConfigError: the value has another type, is no number that can be computed with, or is absent and there is no
            default.
    """
    value = values.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"{name_of(values, key)} is missing")
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not -LARGEST_INT <= value <= LARGEST_INT:
        raise ConfigError(
            f"{name_of(values, key)}: expected a finite number of at most {LARGEST_INT:,}, got {shown(value)}"
        )
    if kind is float and is_number:
        return kind(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name_of(values, key)}: expected {kind.__name__}, got {shown(value)}")
    return value


def choice_of(values: Json, key: str, known: tuple[str, ...], default: str | None = None) -> str:
    """`values[key]`, which must be one of `known`.

    Raises:
        ConfigError: the value is not one of `known`, or is absent and there is no default.
    """
    value = value_of(values, key, str, default)
    if value not in known:
        raise ConfigError(f"{name_of(values, key)}: expected one of {', '.join(known)}; got {shown(value)}")
    return value


def model_type_of(values: Json, known: tuple[str, ...], default: str | None = None) -> str:
    """`values["model_type"]`, which must be one of `known`.

    Raises:
        ConfigError: the value is not one of `known`, or is absent and there is no default; names the nearest ones.
    """
    value = value_of(values, "model_type", str, default)
    if value not in known:
        close = get_close_matches(value[:MOST_COMPARED], known)
        raise ConfigError(
            f"{name_of(values, 'model_type')}: expected one of {', '.join(known)}; got {shown(value)}"
            f"{', nearest to ' + ', '.join(close) if close else ''} (--list-models says what each is)"
        )
    return value


def object_of(values: Json, key: str) -> Section | None:
    """`values[key]` as an object, or None where it is absent or null.

    Raises:
        ConfigError: the value is something other than an object.
    """
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name_of(values, key)}: expected an object, got {shown(value)}")
    return None if value is None else Section(value, f"{name_of(values, key)}.")


def square_side(values: Json, key: str, default: int | None = None) -> int:
    """A size given as one number or as a pair of equal numbers.

    Raises:
        ConfigError: the size is not square, or is absent and there is no default.
    """
    value = values.get(key)
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        return value_of(Section({key: value[0]}, name_of(values, "")), key, int)
    if isinstance(value, list | tuple | dict):
        raise ConfigError(f"{name_of(values, key)}: only square sizes are supported, got {shown(value)}")
    return value_of(values, key, int, default)
