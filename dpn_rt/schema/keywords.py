"""Arguments that a class does not know."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from dpn_rt.errors import DpnError

Class = TypeVar("Class", bound=type)


def lists_keywords(error: type[DpnError]) -> Callable[[Class], Class]:
    """Decorator of a class: `error` instead of Python's TypeError for an unknown argument; it lists those that exist.

    Args:
        error: to raise.
    """

    def decorate(cls: Class) -> Class:
        init = cls.__init__  # type: ignore[misc]
        known = list(inspect.signature(init).parameters)[1:]

        @functools.wraps(init)
        def checked(*args: Any, **kwargs: Any) -> None:
            for name in kwargs:
                if name not in known:
                    raise error(f"{cls.__name__} has no argument {name!r:.80}: expected {', '.join(known)}")
            init(*args, **kwargs)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate
