"""SPEC strings such as "fastv:k=2,ratio=0.5" -> configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dpn_rt.errors import ConfigError
from dpn_rt.model.reduction.chain import Chain, StepConfig, chain_problems
from dpn_rt.model.reduction.divprune import DivPrune
from dpn_rt.model.reduction.fastv import FastV
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.pyramiddrop import PyramidDrop
from dpn_rt.model.reduction.random import RandomKeep
from dpn_rt.schema.text import MAX_SHOWN, shown

Spec = str | Mapping[str, Any]
"""`method:key=value,...`, several of them joined by +; or one of them as {"method": ..., "key": value}."""

MOST_CHARACTERS = 4096
"""Of a SPEC; of an object also its items."""
_NONE = "none"
_SEPARATORS = {"x": "x", "-": r"(?<![eE])-"}
"""Patterns between numbers: the minus of an exponent is none."""
_METHODS: dict[str, type[StepConfig]] = {
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "random": RandomKeep,
    "pool": Pool,
    "divprune": DivPrune,
}


def parse_spec(spec: Any, num_layers: int) -> Chain:
    """The reduction that a SPEC names, checked for a decoder of `num_layers`.

    Raises:
        ConfigError: a method or key is unknown, a value has the wrong form or is out of range, or steps contradict
            each other.
    """
    if (size := _size(spec)) > MOST_CHARACTERS:
        raise ConfigError(f"reduce: {size} characters or items or more, expected at most {MOST_CHARACTERS}")
    parts: list[tuple[Any, Mapping[str, Any]]]
    if isinstance(spec, str):
        parts = [_split(part, spec) for part in spec.split("+")]
    elif isinstance(spec, Mapping):
        parts = [(spec.get("method"), {key: value for key, value in spec.items() if key != "method"})]
    else:
        raise ConfigError(f"reduce={shown(spec)}: expected a text such as 'fastv:k=2,ratio=0.5', or an object")
    if [method for method, _ in parts] == [_NONE] and not parts[0][1]:
        return Chain.of()
    chain = Chain.of(*(_step(method, values, spec) for method, values in parts))
    problems = list(chain_problems(chain, num_layers))
    if problems:
        raise ConfigError(f"reduce={shown(spec)}: " + "; ".join(_cut(problem) for problem in problems[:5]))
    return chain


def _size(value: Any, depth: int = 0) -> int:
    """Characters and items of a value; of a large part its own length alone, and of a large whole no more than shows
    it. What is nested deeper than any value of a SPEC is too large."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, Mapping | list | tuple):
        return 1
    if len(value) > MOST_CHARACTERS or depth > 2:
        return max(len(value), MOST_CHARACTERS + 1)
    parts = (part for item in value.items() for part in item) if isinstance(value, Mapping) else value
    size = 0
    for part in parts:
        size += _size(part, depth + 1)
        if size > MOST_CHARACTERS:
            break
    return size


def _cut(problem: str) -> str:
    """A problem for a message: its end says what would be right, and its values may be many."""
    return problem if len(problem) <= MAX_SHOWN else f"{problem[: MAX_SHOWN // 2]}...{problem[-MAX_SHOWN // 2 :]}"


def _split(part: str, spec: str) -> tuple[str, dict[str, str]]:
    method, _, rest = part.strip().partition(":")
    values: dict[str, str] = {}
    for item in rest.split(",") if rest else ():
        key, equals, value = (text.strip() for text in item.partition("="))
        if not equals or not key or not value or key in values:
            raise ConfigError(f"reduce={shown(spec)}: {shown(item)}, expected key=value, each key once")
        values[key] = value
    return method.strip(), values


def _step(method: Any, values: Mapping[str, Any], spec: Any) -> StepConfig:
    if method == _NONE:
        raise ConfigError(f"reduce={shown(spec)}: expected {_NONE!r} to stand alone, without keys and other steps")
    kind = _METHODS.get(method) if isinstance(method, str) else None
    if kind is None:
        raise ConfigError(f"reduce={shown(spec)}: method {shown(method)}, expected one of {[*_METHODS, _NONE]}")
    names = {_key(field.name, kind): field.name for field in fields(kind) if field.name != "method"}
    unknown = [key for key in values if key not in names]
    if unknown:
        raise ConfigError(f"reduce={shown(spec)}: {method} has no {shown(unknown[0])}, expected some of {list(names)}")
    hints = get_type_hints(kind)
    return kind(
        **{
            names[key]: _value(hints[names[key]], value, f"reduce={shown(spec)}: {key}")
            for key, value in values.items()
        }
    )


def _key(name: str, kind: type[StepConfig]) -> str:
    """How a field is spelled in a SPEC. PyramidDrop's `layers` are what a `Step` calls its boundaries."""
    return "layers" if kind is PyramidDrop and name == "before" else name


def _value(hint: Any, value: Any, name: str) -> Any:
    """A value of a field, given as text or as what JSON has."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{name}={shown(value)}, expected {' or '.join(args)}")
    if origin is tuple:
        separator = "x" if args == (int, int) else "-"
        items = re.split(_SEPARATORS[separator], value) if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or (separator == "x" and len(items) != len(args)):
            wanted = "height and width" if separator == "x" else "numbers"
            raise ConfigError(f"{name}={shown(value)}, expected {wanted} joined by {separator}")
        return tuple(_value(args[0], item, name) for item in items)
    try:
        number = None if isinstance(value, bool) or (isinstance(value, str) and "_" in value) else hint(value)
        if number is not None and (isinstance(value, str) or number == value):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{name}={shown(value)}, expected a {'whole ' if hint is int else ''}number")
