"""Frozen dataclasses to JSON values and back. Unknown and missing keys are errors that name them.

A key may be missing where its field has a default: what was written before the field was there means the default.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Annotated, Any, Literal, TypeVar

from dpn_rt.errors import ConfigError
from dpn_rt.schema.bounds import bound_problems
from dpn_rt.schema.field_types import field_types
from dpn_rt.schema.text import shown

T = TypeVar("T")


def to_json(config: Any) -> Any:
    """Plain JSON values of a configuration dataclass (tuples become lists)."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return config


def from_json(cls: type[T], value: Any, path: str = "config") -> T:
    """The configuration of class `cls` from JSON values.

    Raises:
        ConfigError: a key is missing or unknown, or a value has the wrong type or is out of its bounds; the message
            names the path.
    """
    result: T = _parse(cls, value, path)
    problems = list(bound_problems(result, path))
    if problems:
        raise ConfigError("; ".join(problems))
    return result


def _parse(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _parse(args[0], value, path)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, path)
    if origin in (types.UnionType, typing.Union):
        return _parse_union([arg for arg in args if arg is not types.NoneType], types.NoneType in args, value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{path}: expected a list, got {shown(value)}")
        items = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(items) != len(value):
            raise ConfigError(f"{path}: expected {len(items)} items, got {shown(value)}")
        pairs = zip(items, value, strict=True)
        return tuple(_parse(item, part, f"{path}[{i}]") for i, (item, part) in enumerate(pairs))
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{path}: expected one of {', '.join(map(repr, args))}, got {shown(value)}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: expected {kind.__name__}, got {shown(value)}")
    return value


def _parse_union(kinds: list[Any], optional: bool, value: Any, path: str) -> Any:
    """None, one kind, or one of several dataclasses, each of which has a tag: a field with a single literal value."""
    if value is None and optional:
        return None
    if len(kinds) == 1:
        return _parse(kinds[0], value, path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected an object, got {shown(value)}")
    tags = {kind: _tag(kind) for kind in kinds}
    for kind, (name, tag) in tags.items():
        if value.get(name) == tag:
            return _parse_dataclass(kind, value, path)
    name = next(iter(tags.values()))[0]
    known = ", ".join(repr(tag) for _, tag in tags.values())
    raise ConfigError(f"{path}.{name}: expected one of {known}, got {shown(value.get(name))}")


def _tag(kind: Any) -> tuple[str, str]:
    """Name and value of the field that distinguishes a dataclass from the others of its union."""
    for name, hint in field_types(kind).items():
        values = typing.get_args(hint)
        if typing.get_origin(hint) is Literal and len(values) == 1:
            return name, values[0]
    raise TypeError(f"{kind.__name__} has no field with one literal value")


def _parse_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected an object, got {shown(value)}")
    hints = field_types(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    missing = [name for name, field in fields.items() if name not in value and field.default is dataclasses.MISSING]
    unknown = [name for name in value if name not in fields]
    if missing or unknown:
        raise ConfigError(f"{path}: missing keys {missing}, unknown keys {shown(unknown)}")
    given = [name for name in fields if name in value]
    return kind(**{name: _parse(hints[name], value[name], f"{path}.{name}") for name in given})
