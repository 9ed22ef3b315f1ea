"""The engine's process: `python -m dpn_rt.server.engine_client.worker FD`, started by `EngineProcess`."""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace

from dpn_rt.engine.engine import Engine, StepResult
from dpn_rt.engine.loader import load_bare_engine
from dpn_rt.errors import CapacityError, DpnError, ShutdownError
from dpn_rt.memory import lacks_memory, not_enough_memory
from dpn_rt.outputs import RequestOutput
from dpn_rt.server.engine_client.channel import Channel
from dpn_rt.server.engine_client.messages import Abort, Add, EngineSource, Load, Loaded, Update
from dpn_rt.server.logs import set_up_logs

Inbox = queue.SimpleQueue[Add | Abort | None]
"""What the server has asked; None when it has gone."""
log = logging.getLogger("dpn_rt.engine")


def main() -> None:
    """Loads the engine that the first message names, then serves it until the server ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all processes; the server acts on them
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    inbox: Inbox = queue.SimpleQueue()
    try:
        source = channel.receive()
        threading.Thread(target=_receive, args=(channel, inbox), daemon=True).start()
        engine = _load(source, channel)
        if engine is not None:
            EngineLoop(engine, channel, inbox).run()
        threading.Event().wait()  # the engine cannot be loaded or has failed: the server has been told, and ends
    except EOFError:
        os._exit(0)


def _receive(channel: Channel, inbox: Inbox) -> None:
    """The work of a second thread: images arrive during a step, and the end of the server is noticed during one."""
    try:
        while True:
            inbox.put(channel.receive())
    except EOFError:
        os._exit(0)  # the result of the step that runs could not be sent
    except Exception:
        log.exception("a message of the server cannot be read")
        os._exit(1)


def _load(source: EngineSource, channel: Channel) -> Engine | None:
    """The engine, and a message that it is loaded; or None, and a message with the reason."""
    set_up_logs(source.logs.level, as_json=source.logs.as_json)
    try:
        engine = load_bare_engine(source.path, source.device, source.options, verify=False)
    except Exception as error:
        known = CapacityError(not_enough_memory(source.path)) if lacks_memory(error) else error
        if not isinstance(known, DpnError):
            log.exception("the engine cannot be loaded")
            os._exit(1)
        channel.send(Loaded(Load(), known))
        return None
    # What is loaded by now stays. A full pass of the garbage collector over it would stop every stream.
    gc.collect()
    gc.freeze()
    channel.send(Loaded(Load.of(engine)))
    return engine


class EngineLoop:
    """Steps an engine while it has work. Between two steps it does what the server has asked."""

    def __init__(self, engine: Engine, channel: Channel, inbox: Inbox) -> None:
        """Args: engine: used by no other thread from now on."""
        self._engine, self._channel, self._inbox = engine, channel, inbox

    def run(self) -> None:
        """Returns when the server has gone, or after the update that says what has ended the engine.

        Raises:
            EOFError: the server was found gone while an update was sent.
        """
        while self._handle_messages():
            try:
                result = self._engine.step()
                failure: Exception | None = self._engine.failure
            except Exception as error:
                result, failure = StepResult(), error
            result = replace(result, finished=[_reported(output) for output in result.finished])
            reason = None if failure is None else repr(failure)
            self._channel.send(Update(Load.of(self._engine), result, failure=reason))
            if failure is not None:
                return

    def _handle_messages(self) -> bool:
        """Handles the messages that have come, and waits for one while the engine has no work.

        Returns:
            False when the server has gone.
        """
        result = StepResult()
        refused: dict[str, Exception] = {}
        count = self._inbox.qsize() or int(not self._engine.num_unfinished)
        messages = [self._inbox.get() for _ in range(count)]
        if None in messages:
            return False
        for message in _without_ended(messages, refused):
            if isinstance(message, Abort):
                output = self._engine.abort(message.request_id)
                result.finished.extend([] if output is None else [output])
                continue
            try:
                self._engine.add_request(message.request_id, message.prompt, message.params, priority=message.priority)
            except Exception as error:
                refused[message.request_id] = error
        if count:
            self._channel.send(Update(Load.of(self._engine), result, refused))
        return True


def _without_ended(messages: Sequence[Add | Abort | None], refused: dict[str, Exception]) -> list[Add | Abort]:
    """The messages without requests that were aborted before they were taken; these are added to `refused`."""
    left: list[Add | Abort] = []
    aborted: set[str] = set()
    for message in reversed(messages):
        if isinstance(message, Abort):
            aborted.add(message.request_id)
            left.append(message)
        elif message is not None and message.request_id in aborted:
            aborted.remove(message.request_id)
            refused[message.request_id] = ShutdownError("the request was ended before it began")
        elif message is not None:
            left.append(message)
    return left[::-1]


def _reported(output: RequestOutput) -> RequestOutput:
    """An output for the server, its error in the log. Clients get no text of the exception that caused an error."""
    error = output.error
    if error is None:
        return output
    log.error("request %s: %s", output.request_id, error, exc_info=error)
    if error.__cause__ is None:
        return output
    kind = type(error.__cause__).__name__
    message = f"request {output.request_id}: a step failed ({kind}); the server's log has it under this id"
    return replace(output, error=type(error)(message))


if __name__ == "__main__":
    main()
