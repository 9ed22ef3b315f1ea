"""The engine as asyncio sees it: requests in, one asynchronous stream of events per request out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from dpn_rt.engine.detokenizer import Detokenizer
from dpn_rt.errors import RequestError, ShutdownError, StepError
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.server.engine_client.channel import encode, read_message
from dpn_rt.server.engine_client.messages import Abort, Add, Update
from dpn_rt.server.engine_client.process import EngineProcess
from dpn_rt.server.engine_client.stream import Event, RequestStream

SECONDS_TO_ABORT = 5.0
"""At the end, for the step that runs."""
SECONDS_IN_A_HURRY = 0.2
"""The same after `hurry`, and for the process to end."""


class EngineClient:
    """Sends requests to the engine's process and hands out what comes back. Used on one event loop.

    No method waits for a step, except those that are asynchronous.
    """

    def __init__(self, process: EngineProcess, tokenizer: Tokenizer | None) -> None:
        """
        Args:
            process: has loaded its engine, which makes text only for requests with stop strings.
            tokenizer: the engine's, for the text of all other requests.
        """
        self._process, self._tokenizer = process, tokenizer
        self.load = process.load
        """What the engine had to do at its last update."""
        self.failure: Exception | None = None
        """What ended the engine, unless that was `stop`."""
        self._told = "the engine has stopped: shutting down"
        self._is_hurried = self._is_closed = False
        self._failed = asyncio.Event()
        self._is_stopping = False
        self._streams: dict[str, RequestStream] = {}
        """Of requests that were sent and have not ended, whether they are still read or not."""
        self._busy_since: float | None = None
        """When the work at hand was sent, or the last update came; None while there is no work."""

    async def start(self) -> None:
        """Connects to the process. To be called once."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._process.connection())
        self._receiving = asyncio.create_task(self._receive())

    async def stop(self) -> None:
        """Ends all requests and the process, even one that stands still."""
        await self.abort_all(SECONDS_IN_A_HURRY if self._is_hurried else SECONDS_TO_ABORT)
        self._is_stopping = True
        self._writer.transport.abort()  # `close` would wait until a process that stands still has read everything
        await asyncio.to_thread(self._process.stop, SECONDS_IN_A_HURRY if self._is_hurried else None)
        await self._receiving
        self._end_streams()

    def hurry(self) -> None:
        """`stop` is to wait for nothing. May be called from a signal handler."""
        self._is_hurried = True

    def kill(self) -> None:
        """Ends the process by force, without waiting."""
        self._process.kill()

    async def failed(self) -> Exception:
        """Waits until the engine has failed; gives what ended it."""
        await self._failed.wait()
        assert self.failure is not None
        return self.failure

    @property
    def num_streams(self) -> int:
        """Requests that were sent and have not ended."""
        return len(self._streams)

    @property
    def stalled_seconds(self) -> float:
        """Seconds for which the work at hand has waited for an update: 0 without work, endless after a failure."""
        if self.failure is not None:
            return float("inf")
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    async def stream(
        self,
        request_id: str,
        prompt: ProcessedPrompt,
        params: SamplingParams,
        priority: int = 0,
        *,
        only_first: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Runs a request. Leaving the iterator early (`aclose`) aborts it.

        Args:
            only_first: give the first progress and the output, for a reader who needs nothing between them.

        Raises:
            RequestError, CapacityError: as `Engine.add_request`, before the first event.
            DpnError: what ended the request, after its last event.
        """
        if request_id in self._streams:
            raise RequestError(f"request id {request_id!r} is in use")
        if self._is_closed or self.failure is not None:
            raise self._stopped()
        stream = RequestStream(self._detokenizers(params), only_first)
        self._streams[request_id] = stream
        self._busy_since = self._busy_since or time.monotonic()
        self._writer.write(encode(Add(request_id, prompt, params, priority)))
        try:
            while True:
                event = await stream.next()
                yield event
                if isinstance(event, RequestOutput):
                    if event.error is not None:
                        raise event.error
                    return
        finally:
            if not stream.has_ended:
                stream.leave()
                self._writer.write(encode(Abort(request_id)))

    async def abort_all(self, seconds: float = SECONDS_TO_ABORT) -> None:
        """Ends every request, and takes no new ones. Each stream gets its output, with finish reason "abort".

        Args:
            seconds: for the engine; then streams that are left end with an error.
        """
        self._is_closed = True
        streams = dict(self._streams)
        for request_id in streams:
            self._writer.write(encode(Abort(request_id)))
        try:
            async with asyncio.timeout(seconds):
                for stream in streams.values():
                    await stream.wait_until_ended()
        except TimeoutError:
            self._end_streams()

    def _detokenizers(self, params: SamplingParams) -> list[Detokenizer] | None:
        """None where the engine makes the text itself, or no text is made."""
        if self._tokenizer is None or params.stop_strings:
            return None
        return [Detokenizer(self._tokenizer, params) for _ in range(params.n)]

    async def _receive(self) -> None:
        """A task: takes updates until the process ends or fails."""
        try:
            while self.failure is None:
                self._take(await read_message(self._reader))
        except EOFError:
            if not self._is_stopping:
                how = await asyncio.to_thread(self._process.wait)
                self._fail(StepError(how), how)
        except Exception as error:
            self._fail(error, "an update of its process cannot be read")

    def _take(self, update: Update) -> None:
        self.load = update.load
        for progress in update.result.progress:
            if stream := self._streams.get(progress.request_id):
                stream.add(progress)
        for output in update.result.finished:
            if stream := self._streams.pop(output.request_id, None):
                stream.finish(output)
        for request_id, error in update.refused.items():
            if stream := self._streams.pop(request_id, None):
                stream.fail(error)
        self._busy_since = time.monotonic() if self._streams else None
        if update.failure is not None:
            self._fail(StepError(update.failure), "a step failed")

    def _fail(self, error: Exception, told: str) -> None:
        """Args: told: what clients are told of it, without the text of an exception."""
        self.failure, self._told = error, f"the engine has stopped: {told}"
        self._end_streams()
        self._failed.set()

    def _end_streams(self) -> None:
        for stream in self._streams.values():
            stream.fail(self._stopped())
        self._streams.clear()

    def _stopped(self) -> StepError:
        return ShutdownError(self._told) if self.failure is None else StepError(self._told)
