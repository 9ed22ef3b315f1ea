"""The process that an engine has to itself: `python -m dpn_rt.server.stepping.worker FD`, run by `EngineProcess`."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
from concurrent.futures import Future

from dpn_rt.engine.engine import StepResult
from dpn_rt.engine.loader import load_bare_engine
from dpn_rt.errors import DpnError
from dpn_rt.server.logs import set_up_logs
from dpn_rt.server.stepping.channel import Channel
from dpn_rt.server.stepping.engine_thread import EngineThread
from dpn_rt.server.stepping.messages import Abort, Add, Answered, EngineSource, Loaded, Stepped
from dpn_rt.server.stepping.stepper import Load

log = logging.getLogger("dpn_rt.engine")


def main() -> None:
    """Load what the first message names, then do what the others ask, until the server ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a service; its end is the server's affair
        signal.signal(number, signal.SIG_IGN)
    worker = _Worker(Channel(socket.socket(fileno=int(sys.argv[1]))))
    try:
        worker.run()
    except EOFError:  # in order or not: nobody waits for the step that runs
        os._exit(0)


class _Worker:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._engine: EngineThread | None = None

    def run(self) -> None:
        """Raises EOFError when the server is gone."""
        source = self._channel.receive()
        # Beside this thread, so that a server which ends meanwhile is noticed.
        threading.Thread(target=self._load, args=(source,), daemon=True).start()
        while True:
            self._call(self._channel.receive())

    def _load(self, source: EngineSource) -> None:
        set_up_logs(source.logs.level, as_json=source.logs.as_json)
        try:
            engine = load_bare_engine(source.path, source.device, source.runtime, verify=False)
        except DpnError as error:
            self._send(Loaded(Load(), error))
            return
        except Exception:
            log.exception("the engine cannot be loaded")
            os._exit(1)
        # What is loaded by now stays. Left to the garbage collector, a full pass over it would stop every stream.
        gc.collect()
        gc.freeze()
        self._engine = EngineThread(engine)
        self._engine.start(self._stepped)
        self._send(Loaded(self._engine.load))

    def _call(self, message: Add | Abort) -> None:
        assert self._engine is not None, "calls follow Loaded"
        if isinstance(message, Add):
            future = self._engine.add(message.request_id, message.prompt, message.params, message.priority)
        else:
            future = self._engine.abort(message.request_id)

        def answer(done: Future[object]) -> None:
            error = done.exception()
            assert error is None or isinstance(error, Exception)
            self._send(Answered(message.call, None if error else done.result(), error))

        future.add_done_callback(answer)

    def _stepped(self, result: StepResult) -> None:
        assert self._engine is not None
        for output in result.finished:
            if output.error is not None:  # its cause does not travel
                log.error("request %s: %s", output.request_id, output.error, exc_info=output.error)
        failure = self._engine.failure
        self._send(Stepped(result, self._engine.load, None if failure is None else repr(failure)))

    def _send(self, message: object) -> None:
        try:
            self._channel.send(message)
        except OSError:
            os._exit(0)  # as above


if __name__ == "__main__":
    main()
