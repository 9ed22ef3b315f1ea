"""One engine for any number of callers, in one thread or in several: a step serves the requests of all."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dpn_rt.engine.engine import Engine, Progress
from dpn_rt.engine.turns import Turns
from dpn_rt.errors import StepError
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.sampling.params import SamplingParams


@dataclass(eq=False)
class Inbox:
    """What steps have given to one request since its caller last looked."""

    progress: deque[tuple[Progress, RequestOutput | None]] | None = None
    """With the output beside the last one; None where only the output is wanted."""
    output: RequestOutput | None = None
    """It comes after its progress."""


class SharedEngine:
    """Gives each caller what the steps of all of them bring."""

    def __init__(self, engine: Engine) -> None:
        """Args: engine: used through this object alone."""
        self._engine, self._turns = engine, Turns()
        self._ids = itertools.count()
        self._inboxes: dict[str, Inbox] = {}
        self._withdrawn: deque[str] = deque()
        """Requests that are not wanted any more."""
        self._process, self._is_closed = os.getpid(), False

    def new_id(self) -> str:
        """An id that no other request has."""
        return str(next(self._ids))

    def submit(
        self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams, priority: int, inbox: Inbox
    ) -> None:
        """Queues a request.

        Args:
            request_id: of `new_id`.
            prompt: of the request.
            params: of the request.
            priority: lower numbers go first.
            inbox: is filled by steps.

        Raises:
            RequestError, CapacityError, DeviceError: as `Engine.add_request`.
            StepError: the engine has been closed, or was loaded before this process was forked.
        """
        with self._turn():
            if self._is_closed:
                raise StepError("the engine was closed: expected a new one")
            self._engine.add_request(request_id, prompt, params, priority=priority)
            self._inboxes[request_id] = inbox

    def step(self) -> None:
        """One step for the requests of all callers. Ctrl-C waits until their inboxes are filled.

        Raises:
            StepError: as `submit`.
        """
        with self._turn():
            result = self._engine.step()
            outputs = {output.request_id: output for output in result.finished}
            last = {item.request_id: item for item in result.progress}
            for item in result.progress:
                inbox = self._inboxes.get(item.request_id)
                if inbox is not None and inbox.progress is not None:
                    output = outputs.get(item.request_id) if item is last[item.request_id] else None
                    inbox.progress.append((item, output))
            for request_id, output in outputs.items():
                inbox = self._inboxes.pop(request_id, None)
                if inbox is not None:
                    inbox.output = output

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """Ends requests that have not ended, so that their KV blocks are free: at once, or at the end of a turn that
        somebody has. That may be this thread's own, since the garbage collector closes generators at any place."""
        self._withdrawn.extend(request_ids)
        with self._turns.turn_if_free() as is_free:
            while is_free and self._withdrawn:
                request_id = self._withdrawn.popleft()
                self._inboxes.pop(request_id, None)
                self._engine.abort(request_id)

    def close(self) -> None:
        """Ends the processes of other ranks; no request is taken any more. A forked child has nothing to end."""
        if os.getpid() != self._process:
            return
        with self._turn():
            self._is_closed = True
            self._engine.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if os.getpid() != self._process:
            raise StepError(
                f"the engine was loaded by process {self._process}, of whose threads its child {os.getpid()} has none: "
                "expected to be loaded by the child, or one that is started by 'spawn'"
            )
        with self._turns.turn():
            yield
        if self._withdrawn:  # by others, while this thread had the turn
            self.withdraw(())
