"""Threads that share an engine take turns with it, one step at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dpn_rt.engine.interrupts import deferred_interrupt


class Turns:
    """Who has the engine. Ctrl-C waits until a turn has ended."""

    def __init__(self) -> None:
        self._next, self._busy = threading.Lock(), threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for a turn. A thread that has just had one cannot have another before one that waits."""
        with deferred_interrupt():
            with self._next:  # kept by the thread that waits, so that no other passes it
                self._busy.acquire()
            try:
                yield
            finally:
                self._busy.release()

    @contextmanager
    def turn_if_free(self) -> Iterator[bool]:
        """A turn if no thread has one, not even this; whether there was one."""
        with deferred_interrupt():
            is_free = self._busy.acquire(blocking=False)
            try:
                yield is_free
            finally:
                if is_free:
                    self._busy.release()
