"""How large bodies may be, one and all together, counted while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive

from dpn_rt.server.errors import HttpError, OverloadedError


class BodyLimits:
    """The bytes of all bodies that the server holds: a body is held until its request has been answered."""

    def __init__(self, max_bytes: int, max_held_bytes: int) -> None:
        self.max_bytes, self.max_held_bytes = max_bytes, max_held_bytes
        self.held_bytes = 0

    @contextmanager
    def enter(self, content_length: bytes) -> Iterator[Body]:
        """Room for one body, for the time of its request.

        Args:
            content_length: the header, empty where there is none; nothing is reserved for what has not come.

        Raises:
            HttpError: 413, it is too large by its header; OverloadedError: there is no room for it now.
        """
        body = Body(self)
        if content_length.isdigit():
            body.check(int(content_length))
        try:
            yield body
        finally:
            self.held_bytes -= body.received_bytes


class Body:
    """One body, as far as it has come."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self.received_bytes = 0

    def limited(self, receive: Receive) -> Receive:
        """`receive`, which raises what `check` does as soon as too much has come."""

        async def limited() -> Message:
            message = await receive()
            more = len(message.get("body", b""))
            self.received_bytes += more
            self._limits.held_bytes += more
            self.check(0)
            return message

        return limited

    def check(self, more: int) -> None:
        """Whether `more` bytes may come.

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
