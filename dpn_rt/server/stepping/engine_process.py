"""The engine in a process of its own: neither HTTP nor the reading of images takes Python's lock from its steps."""

from __future__ import annotations

import itertools
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType

from dpn_rt.engine.engine import StepResult
from dpn_rt.errors import EngineError, StepError
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.server.stepping import worker
from dpn_rt.server.stepping.channel import Channel
from dpn_rt.server.stepping.messages import Abort, Add, Answered, EngineSource, Loaded, Stepped
from dpn_rt.server.stepping.stepper import Deliver, Load, Stepper

SECONDS_TO_END = 5.0
"""For the process, before it is killed."""


class EngineProcess(Stepper):
    """A `Stepper` whose engine runs in another process, which ends with this one however this one ends.

    As a context: the process ends with it.
    """

    def __init__(self, source: EngineSource) -> None:
        """Begins to load the engine."""
        super().__init__(Load())
        here, there = socket.socketpair()
        with here, there:
            # A group of its own: Ctrl-C on a terminal is the server's to act on.
            self._process = subprocess.Popen(
                [sys.executable, "-m", worker.__name__, str(there.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                process_group=0,
            )
            self._channel = Channel(here.dup())
        self._deliver: Deliver = lambda _: None
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._calls: dict[int, Future[object]] = {}
        self._outbox: queue.SimpleQueue[Add | Abort | None] = queue.SimpleQueue()
        self._is_stopping = False
        self._threads = [
            threading.Thread(target=target, name=f"dpn_rt-{target.__name__.strip('_')}", daemon=True)
            for target in (self._receive, self._send)
        ]
        with suppress(OSError):  # it has ended already, as `wait_until_loaded` tells
            self._channel.send(source)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_loaded(self) -> None:
        """To be called once, before `start`.

        Raises:
            DpnError: as `load_engine`; EngineError: the process has ended.
        """
        try:
            loaded: Loaded = self._channel.receive()
        except EOFError:
            raise EngineError(f"{self._end()} while it loaded the engine") from None
        if loaded.error is not None:
            raise loaded.error
        self._load = loaded.load

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the process, in the middle of a step if need be, and waits for that."""
        with self._lock:
            self._is_stopping = True
        self._outbox.put(None)
        self._channel.shut_down()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._channel.close()
        self._end_calls("shutting down")

    def add(
        self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams, priority: int = 0
    ) -> Future[object]:
        return self._call(lambda call: Add(call, request_id, prompt, params, priority))

    def abort(self, request_id: str) -> Future[object]:
        return self._call(lambda call: Abort(call, request_id))

    def _call(self, message: Callable[[int], Add | Abort]) -> Future[object]:
        future: Future[object] = Future()
        with self._lock:
            if self._is_stopping or self._failure is not None:
                future.set_exception(StepError(f"the engine has stopped: {self._failure or 'shutting down'}"))
                return future
            number = next(self._numbers)
            self._calls[number] = future
            self._busy_since = self._busy_since or time.monotonic()
        self._outbox.put(message(number))
        return future

    def _send(self) -> None:
        """A thread's work: a prompt with its image is larger than what the socket holds, and waits for a reader."""
        while (message := self._outbox.get()) is not None:
            try:
                self._channel.send(message)
            except OSError:
                return  # the process has ended, as the other thread sees too

    def _receive(self) -> None:
        try:
            while True:
                message: Stepped | Answered = self._channel.receive()
                if isinstance(message, Answered):
                    self._answer(message)
                else:
                    self._take(message)
        except EOFError:
            if not self._is_stopping and self._failure is None:
                self._fail(StepError(self._end()))

    def _answer(self, message: Answered) -> None:
        with self._lock:
            future = self._calls.pop(message.call, None)
            self._note_life()
        if future is None or not future.set_running_or_notify_cancel():
            return
        if message.error is not None:
            future.set_exception(message.error)
        else:
            future.set_result(message.value)

    def _take(self, message: Stepped) -> None:
        with self._lock:
            self._load = message.load
            self._note_life()
        if message.failure is not None and self._failure is None:
            self._fail(StepError(message.failure))
        else:
            self._deliver(message.result)

    def _note_life(self) -> None:
        self._busy_since = time.monotonic() if self._calls or self._load.unfinished else None

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = error
        self._end_calls(error)
        self._deliver(StepResult())

    def _end_calls(self, reason: object) -> None:
        with self._lock:
            calls = list(self._calls.values())
            self._calls.clear()
        for future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(StepError(f"the engine has stopped: {reason}"))

    def _end(self) -> str:
        status = self._process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"the engine's process {how}"
