"""Values that may be needed again, within a bound in bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LruCache(Generic[Value]):
    """Least recently used values leave first. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()
        self.num_bytes = 0
        self.queries = 0
        self.hits = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def find(self, key: bytes) -> Value | None:
        """The value of a key, None if it is not there."""
        self.queries += 1
        entry = self._entries.get(key)
        if entry is None:
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def insert(self, key: bytes, value: Value, num_bytes: int) -> None:
        """Keeps a value of a size, unless it is there or alone too large."""
        if key in self._entries or num_bytes > self._max_bytes:
            return
        self._entries[key] = value, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            _, (_, oldest) = self._entries.popitem(last=False)
            self.num_bytes -= oldest
