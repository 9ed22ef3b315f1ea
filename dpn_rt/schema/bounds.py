"""The least and the largest that each number of a configuration may be, and the check.

The bounds are far beyond every published model. They keep a wrong number from becoming hours or terabytes before the
weights show that it is wrong. Fields of configurations name their bounds by their type: `num_layers: Layers`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeGuard, TypeVar

from dpn_rt.errors import ConfigError
from dpn_rt.schema.field_types import field_types

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """Of a number, or of how many items a tuple has."""

    least: float
    most: float

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None: it is within the bounds. NaN is within none."""
        number, what = (len(value), " items") if isinstance(value, tuple) else (value, "")
        if self.least <= number <= self.most:
            return None
        if isinstance(number, float) and not math.isfinite(number):
            return f"must be a finite number, got {number}"
        if number > self.most:
            return f"must be at most {self.most}{what}, got {number}"
        if self.least > 0 and not number > 0:
            return f"must be positive, got {number}"
        return f"must be at least {self.least}{what}, got {number}"


LARGEST_INT = 2**53
"""Largest whole number of any file that is read, so that sums and products of floats have it exactly."""

Layers = Annotated[int, Bounds(1, 1024)]
LayerCount = Annotated[int, Bounds(0, 1024)]
"""Of a tower, which may be cut before its first layer."""
Vocabulary = Annotated[int, Bounds(1, 2**22)]
TokenId = Annotated[int, Bounds(0, 2**22)]
Width = Annotated[int, Bounds(1, 2**20)]
"""Features of a row: hidden and intermediate sizes, channels."""
Heads = Annotated[int, Bounds(1, 4096)]
HeadDim = Annotated[int, Bounds(1, 4096)]
Positions = Annotated[int, Bounds(1, 2**24)]
MAX_SIDE = 4096
Side = Annotated[int, Bounds(1, MAX_SIDE)]
"""Pixels or visual tokens per side."""
Epsilon = Annotated[float, Bounds(1e-20, 1)]
Theta = Annotated[float, Bounds(1, 1e15)]
Count = Annotated[int, Bounds(1, 2**20)]
FileBytes = Annotated[int, Bounds(0, LARGEST_INT)]
FEW = Bounds(0, 256)
"""Boundaries, kernels, ids that end an answer: lists that are walked for each request."""
_DEFAULTS = {int: Bounds(-LARGEST_INT, LARGEST_INT), float: Bounds(-sys.float_info.max, sys.float_info.max)}
"""Of fields that name none: whole numbers that floats can hold, and finite numbers."""


def is_whole(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value that a caller gave is a whole number of at least this; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def bound_problems(config: Any, name: str = "") -> Iterator[str]:
    """What is out of bounds in a configuration dataclass and those inside it.

    Args:
        name: of the configuration, such as `model`; its fields are named after it.
    """
    kind: Any = type(config)
    for field, hint in field_types(kind).items():
        if field in kind.__dataclass_fields__:
            yield from _problems(hint, getattr(config, field), f"{name}.{field}" if name else field)


def bounded(config: T, place: str = "") -> T:
    """A configuration that has just been made of numbers from a file, before anything is computed with them.

    Args:
        place: goes before each problem.

    Raises:
        ConfigError: numbers are out of bounds; all are named.
    """
    problems = [f"{place}{problem}" for problem in bound_problems(config)]
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _problems(hint: Any, value: Any, name: str) -> Iterator[str]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(value):
        yield from bound_problems(value, name)
    elif origin in (types.UnionType, typing.Union):
        kinds = [arg for arg in args if arg is not types.NoneType]
        if value is not None and len(kinds) == 1:
            yield from _problems(kinds[0], value, name)
    elif origin is tuple and isinstance(value, tuple):
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        for position, (item, part) in enumerate(zip(items, value, strict=False)):
            yield from _problems(item, part, f"{name}[{position}]")
    elif origin is Annotated or hint in _DEFAULTS:
        kind, bounds = args if origin is Annotated else (hint, _DEFAULTS[hint])
        problem = bounds.problem(value)
        if problem is not None:
            yield f"{name} {problem}"
        elif kind not in _DEFAULTS:
            yield from _problems(kind, value, name)
