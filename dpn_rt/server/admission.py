"""The limit of the queue in requests and tokens. A request takes its places before anything of it is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dpn_rt.server.errors import OverloadedError


@dataclass(eq=False)
class Ticket:
    """Places in the queue, one for each prompt of a request."""

    _admission: Admission
    prompts: int
    tokens: int
    """Estimated for all these prompts together."""

    def leave(self) -> None:
        """Gives one place back; to be called when its prompt begins to run."""
        if self.prompts:
            tokens = self.tokens // self.prompts
            self._give_back(1, tokens)

    def leave_all(self) -> None:
        """Gives all remaining places back."""
        self._give_back(self.prompts, self.tokens)

    def _give_back(self, prompts: int, tokens: int) -> None:
        self.prompts -= prompts
        self.tokens -= tokens
        self._admission.prompts -= prompts
        self._admission.tokens -= tokens


class Admission:
    """Counts the prompts that wait. Used on one event loop."""

    def __init__(self, max_prompts: int, max_tokens: int) -> None:
        self._max_prompts, self._max_tokens = max_prompts, max_tokens
        self.prompts = 0
        self.tokens = 0
        self.active = 0
        """Requests that have entered and not ended, whether they wait or run."""
        self.is_closed = False
        """No request may enter any more, since the server is shutting down."""

    @contextmanager
    def enter(self, tokens: int, prompts: int = 1) -> Iterator[Ticket]:
        """Takes places for a request's prompts. A request that finds the queue empty is never too large.

        Args:
            tokens: of all its prompts and answers, estimated.
            prompts: how many it has.

        Raises:
            OverloadedError: the queue is full, or closed.
        """
        if self.is_closed:
            raise OverloadedError("the server is shutting down: try another one", status=503)
        if self.prompts >= self._max_prompts or (self.prompts and self.prompts + prompts > self._max_prompts):
            raise OverloadedError(
                f"{self.prompts} prompts are waiting and the request has {prompts}: expected at most "
                f"{self._max_prompts} together"
            )
        if self.prompts and self.tokens + tokens > self._max_tokens:
            raise OverloadedError(
                f"{self.tokens} tokens are waiting and the request may need {tokens}: expected at most "
                f"{self._max_tokens} together"
            )
        self.active += 1
        self.prompts += prompts
        self.tokens += tokens
        ticket = Ticket(self, prompts, tokens)
        try:
            yield ticket
        finally:
            self.active -= 1
            ticket.leave_all()
