"""The types of a dataclass's fields."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@functools.cache
def field_types(kind: type) -> Mapping[str, Any]:
    """The types of all annotated names of a class, `Annotated` as it stands. Python compiles each annotation for that,
    so a class is asked once."""
    return MappingProxyType(typing.get_type_hints(kind, include_extras=True))
