"""The queue's limit in requests and tokens, taken before anything of a request is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dpn_rt.server.errors import OverloadedError


@dataclass(eq=False)
class Ticket:
    """A place in the queue; `leave` gives it back, once, as soon as the request runs."""

    _admission: Admission
    tokens: int
    _is_held: bool = True

    def leave(self) -> None:
        if self._is_held:
            self._is_held = False
            self._admission.requests -= 1
            self._admission.tokens -= self.tokens


class Admission:
    """Counts who waits. Used on one event loop."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self.requests = 0
        self.tokens = 0
        self.active = 0
        """Requests that have entered and not ended, running ones included."""
        self.is_closed = False
        """No one gets in any more: the server is going down."""

    @contextmanager
    def enter(self, tokens: int) -> Iterator[Ticket]:
        """A place for one request with an estimated number of tokens; a request alone is never too large.

        Raises:
            OverloadedError: the queue is full, or closed.
        """
        if self.is_closed:
            raise OverloadedError("the server is shutting down: try another one", status=503)
        if self.requests >= self._max_requests:
            raise OverloadedError(f"{self.requests} requests are waiting, expected fewer than {self._max_requests}")
        if self.requests and self.tokens + tokens > self._max_tokens:
            raise OverloadedError(
                f"{self.tokens} tokens are waiting and the request may need {tokens}: expected at most "
                f"{self._max_tokens} together"
            )
        self.active += 1
        self.requests += 1
        self.tokens += tokens
        ticket = Ticket(self, tokens)
        try:
            yield ticket
        finally:
            self.active -= 1
            ticket.leave()
