"""The limit of the queue in requests and tokens. A request takes its places before anything of it is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dpn_rt.server.errors import HttpError, OverloadedError


@dataclass(eq=False)
class Ticket:
    """Places in the queue: for each prompt of a request as many as it has answers."""

    _admission: Admission
    prompts: int
    answers: int
    """Of each prompt."""
    tokens: int
    """Estimated for all these prompts together."""

    def leave(self) -> None:
        """Gives the places of one prompt back; to be called when it begins to run."""
        if self.prompts:
            self._give_back(1, self.tokens // self.prompts)

    def leave_all(self) -> None:
        """Gives all remaining places back."""
        self._give_back(self.prompts, self.tokens)

    def _give_back(self, prompts: int, tokens: int) -> None:
        self.prompts -= prompts
        self.tokens -= tokens
        self._admission.answers -= prompts * self.answers
        self._admission.tokens -= tokens


class Admission:
    """Counts the answers that wait. Used on one event loop."""

    def __init__(self, max_answers: int, max_tokens: int) -> None:
        self._max_answers, self._max_tokens = max_answers, max_tokens
        self.answers = 0
        """Answers that wait; a prompt counts as often as it is to be answered."""
        self.tokens = 0
        self.active = 0
        """Requests that have entered and not ended, whether they wait or run."""
        self.is_closed = False
        """No request may enter any more, since the server is shutting down."""

    @contextmanager
    def enter(self, tokens: int, prompts: int = 1, answers: int = 1) -> Iterator[Ticket]:
        """Takes places for a request's prompts.

        Args:
            tokens: of all its prompts and answers, estimated. One answer that finds the queue empty may have any.
            prompts: how many it has.
            answers: of each prompt.

        Raises:
            OverloadedError: the queue is full, or closed; HttpError: the request alone is more than the queue holds.
        """
        if self.is_closed:
            raise OverloadedError("the server is shutting down: try another one", status=503)
        places = prompts * answers
        if places > self._max_answers:
            raise HttpError(
                400,
                f"{prompts} prompts with n={answers} are {places} answers: expected at most {self._max_answers} "
                "answers in a request",
            )
        if places > 1 and tokens > self._max_tokens:
            raise HttpError(
                400,
                f"{places} answers may need {tokens} tokens: expected at most {self._max_tokens} tokens in a request "
                "of several answers",
            )
        if self.answers + places > self._max_answers:
            raise OverloadedError(
                f"{self.answers} answers are waiting and the request has {places}: expected at most "
                f"{self._max_answers} together"
            )
        if self.answers and self.tokens + tokens > self._max_tokens:
            raise OverloadedError(
                f"{self.tokens} tokens are waiting and the request may need {tokens}: expected at most "
                f"{self._max_tokens} together"
            )
        self.active += 1
        self.answers += places
        self.tokens += tokens
        ticket = Ticket(self, prompts, answers, tokens)
        try:
            yield ticket
        finally:
            self.active -= 1
            ticket.leave_all()
