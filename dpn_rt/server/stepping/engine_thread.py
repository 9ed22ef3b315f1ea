"""The engine on a thread of its own: requests join and leave between its steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from dpn_rt.engine.engine import Engine, StepResult
from dpn_rt.errors import StepError
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.server.stepping.stepper import Deliver, Load, Stepper

Command = Callable[[], object]


class EngineThread(Stepper):
    """A `Stepper` within this process."""

    def __init__(self, engine: Engine) -> None:
        """Args: engine: touched by this thread alone from `start` on."""
        super().__init__(look(engine))
        self._engine = engine
        self._deliver: Deliver = lambda _: None
        self._commands: deque[tuple[Command, Future[object]]] = deque()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="dpn_rt-engine", daemon=True)

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._thread.start()

    def stop(self) -> None:
        """Ends after the step that runs now, and waits for that."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def add(
        self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams, priority: int = 0
    ) -> Future[object]:
        return self._command(lambda: self._engine.add_request(request_id, prompt, params, priority=priority))

    def abort(self, request_id: str) -> Future[object]:
        return self._command(lambda: self._engine.abort(request_id))

    def _command(self, command: Command) -> Future[object]:
        future: Future[object] = Future()
        with self._wake:
            if self._is_stopping or self._failure is not None:
                future.set_exception(StepError(f"the engine has stopped: {self._failure or 'shutting down'}"))
                return future
            self._commands.append((command, future))
            self._wake.notify()
        return future

    def _run(self) -> None:
        try:
            while self._take_commands():
                result = self._engine.step()
                self._load = look(self._engine)
                self._busy_since = time.monotonic() if self._engine.num_unfinished else None
                self._deliver(result)
                if self._engine.failure is not None:
                    raise self._engine.failure
        except Exception as error:
            self._fail(error)

    def _take_commands(self) -> bool:
        """Runs what other threads asked for, waiting while there is nothing to do; False when the thread is to end."""
        with self._wake:
            while not (self._commands or self._is_stopping or self._engine.num_unfinished):
                self._wake.wait()
            if self._is_stopping:
                return False
            commands = list(self._commands)
            self._commands.clear()
            self._busy_since = self._busy_since or time.monotonic()
        for command, future in commands:
            if future.set_running_or_notify_cancel():  # a client that left while its request was on its way here
                try:
                    future.set_result(command())
                except Exception as error:
                    future.set_exception(error)
        self._load = look(self._engine)
        return True

    def _fail(self, error: Exception) -> None:
        with self._wake:
            self._failure = error
            commands = list(self._commands)
            self._commands.clear()
        for _, future in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(StepError(f"the engine has stopped: {error!r}"))
        self._deliver(StepResult())


def look(engine: Engine) -> Load:
    """What an engine has to do now."""
    cache = engine.runner.cache
    return Load(
        engine.num_unfinished,
        engine.num_running,
        engine.num_waiting,
        cache.num_blocks - cache.num_free_blocks,
        cache.num_blocks,
        engine.num_preemptions,
        *engine.runner.reuse_statistics(),
    )
