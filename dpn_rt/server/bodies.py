"""Limits of the bodies of requests, for each and for all together. Bytes are counted as they arrive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive

from dpn_rt.server.errors import HttpError, OverloadedError


class BodyLimits:
    """Counts the bytes of all bodies that the server holds. A body is held until its request has been answered."""

    def __init__(self, max_bytes: int, max_held_bytes: int) -> None:
        self.max_bytes, self.max_held_bytes = max_bytes, max_held_bytes
        self.held_bytes = 0

    @contextmanager
    def enter(self, content_length: bytes) -> Iterator[Body]:
        """Room for one body while its request lasts.

        Args:
            content_length: the header, empty where there is none. Nothing is reserved: only bytes that came count.

        Raises:
            HttpError: 413, its header says that it is too large; OverloadedError: there is no room for it now.
        """
        body = Body(self)
        if content_length.isdigit():
            body.check(int(content_length))
        try:
            yield body
        finally:
            self.held_bytes -= body.received_bytes


class Body:
    """The part of one body that has arrived."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self.received_bytes = 0

    def limited(self, receive: Receive) -> Receive:
        """`receive`, but it raises what `check` raises as soon as too many bytes have arrived."""

        async def limited() -> Message:
            message = await receive()
            more = len(message.get("body", b""))
            self.received_bytes += more
            self._limits.held_bytes += more
            self.check(0)
            return message

        return limited

    def check(self, more: int) -> None:
        """Checks that `more` bytes may arrive.

        Raises:
            HttpError: 413, the body is too large; OverloadedError: all bodies together are.
        """
        limits = self._limits
        if self.received_bytes + more > limits.max_bytes:
            raise HttpError(
                413, f"the body has {self.received_bytes + more} bytes or more: expected at most {limits.max_bytes}"
            )
        if limits.held_bytes + more > limits.max_held_bytes:
            raise OverloadedError(
                f"the bodies of unanswered requests have {limits.held_bytes + more} bytes with this one: expected at "
                f"most {limits.max_held_bytes} together"
            )
