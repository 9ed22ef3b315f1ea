"""Values that may be needed again, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LruCache(Generic[Value]):
    """Drops the least recently used values first. Not thread-safe."""

    def __init__(self, max_bytes: int, size_of: Callable[[Value], int]) -> None:
        """
        Args:
            max_bytes: of all values, at most; 0 keeps nothing.
            size_of: bytes of a value.
        """
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._entries: OrderedDict[bytes, Value] = OrderedDict()
        self.num_bytes = 0
        self.queries = 0
        self.hits = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def find(self, key: bytes) -> Value | None:
        """The value of a key; None if it is not kept."""
        self.queries += 1
        value = self._entries.get(key)
        if value is None:
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return value

    def insert(self, key: bytes, value: Value) -> None:
        """Keeps a value, unless its key is known or it is larger than the whole cache."""
        num_bytes = self._size_of(value)
        if key in self._entries or num_bytes > self._max_bytes:
            return
        self._entries[key] = value
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= self._size_of(oldest)
