"""An engine as its server sees it, wherever it runs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from dpn_rt.engine.engine import StepResult
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.sampling.params import SamplingParams

Deliver = Callable[[StepResult], None]


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine had to do when it was last looked at."""

    unfinished: int = 0
    """Requests that wait or run."""
    running: int = 0
    """Sequences that hold cells of the KV cache."""
    waiting: int = 0
    """Sequences that wait for cells or for a place among the running."""
    kv_cells_used: int = 0
    kv_cells: int = 0
    preemptions: int = 0
    """Since the start, as all that follows."""
    prefix_queries: int = 0
    """Rows of prompts, and of these the ones that had been computed before."""
    prefix_hits: int = 0
    image_queries: int = 0
    """Images of prompts, and of these the ones that did not go through the vision tower."""
    image_hits: int = 0


class Stepper(ABC):
    """Steps an engine while it has work. All methods may be called from any thread; none of them waits for a step."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._failure: Exception | None = None
        self._busy_since: float | None = None
        """When the work at hand was given or a step of it has ended last; None when there is none."""

    @property
    def load(self) -> Load:
        return self._load

    @property
    def failure(self) -> Exception | None:
        """What ended the engine, when it was not `stop`."""
        return self._failure

    @property
    def stalled_seconds(self) -> float:
        """How long the work at hand has waited for a step to end; 0 when there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @abstractmethod
    def start(self, deliver: Deliver) -> None:
        """Begin. `deliver` gets the result of each step, and an empty one when the engine has failed, on a thread that
        is not the caller's; it must return soon."""

    @abstractmethod
    def stop(self) -> None:
        """End, and wait for that."""

    @abstractmethod
    def add(
        self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams, priority: int = 0
    ) -> Future[object]:
        """Queues a request; the future fails where `Engine.add_request` does, and with StepError once the engine has
        ended."""

    @abstractmethod
    def abort(self, request_id: str) -> Future[object]:
        """Ends a request before the next step; the future gives what it has so far, None if it is not known."""
