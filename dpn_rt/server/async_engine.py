"""The engine as asyncio sees it: one asynchronous stream of progress per request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace

from dpn_rt.engine.detokenizer import Detokenizer
from dpn_rt.engine.engine import Progress, StepResult
from dpn_rt.errors import RequestError, StepError
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.server.stepping.stepper import Load, Stepper

Event = list[Progress] | RequestOutput
"""What steps have added since the stream was last read; at the end the whole output."""
SECONDS_TO_ABORT = 5.0
"""At the end, for the step that runs."""


class AsyncEngine:
    """Requests in, streams out. Made, started and used on one event loop."""

    def __init__(self, stepper: Stepper, tokenizer: Tokenizer | None) -> None:
        """
        Args:
            stepper: of a bare engine, since most text is made here, off the thread that steps.
            tokenizer: the engine's.
        """
        self._tokenizer = tokenizer
        self._stepper = stepper
        self._failed = asyncio.Event()
        self._streams: dict[str, _Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to step; from here on the engine belongs to its stepper."""
        self._loop = asyncio.get_running_loop()
        self._stepper.start(self._deliver)

    async def stop(self) -> None:
        """End all requests and the stepping, even that of an engine which stands still."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SECONDS_TO_ABORT):
                await self.abort_all()
        await asyncio.to_thread(self._stepper.stop)

    async def failed(self) -> Exception:
        """Waits until the engine has failed; what it died of."""
        await self._failed.wait()
        assert self._stepper.failure is not None
        return self._stepper.failure

    @property
    def load(self) -> Load:
        return self._stepper.load

    @property
    def num_requests(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    @property
    def stalled_seconds(self) -> float:
        """How long the work at hand has waited for a step to end; endless once the engine has failed."""
        return self._stepper.stalled_seconds if self._stepper.failure is None else float("inf")

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
        stream = _Stream(self._text_makers(params), only_first)
        self._streams[request_id] = stream
        try:
            await asyncio.wrap_future(self._stepper.add(request_id, prompt, params, priority))
            while True:
                event = await stream.next()
                yield event
                if isinstance(event, RequestOutput):
                    if event.error is not None:
                        raise event.error
                    return
        finally:
            self._streams.pop(request_id, None)
            if not stream.is_finished:
                self._stepper.abort(request_id)

    async def abort_all(self) -> None:
        """Ends every request; each stream gets its output with finish reason "abort"."""
        for request_id, stream in list(self._streams.items()):
            output = await asyncio.wrap_future(self._stepper.abort(request_id))
            if isinstance(output, RequestOutput):
                stream.finish(output)

    def _text_makers(self, params: SamplingParams) -> list[Detokenizer] | None:
        """None where the engine makes the text itself, or nobody does."""
        if self._tokenizer is None or params.stop_strings:
            return None
        return [Detokenizer(self._tokenizer, params) for _ in range(params.n)]

    def _deliver(self, result: StepResult) -> None:
        assert self._loop is not None
        has_news = result.progress or result.finished or self._stepper.failure is not None
        if has_news and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, result)

    def _dispatch(self, result: StepResult) -> None:
        for progress in result.progress:
            stream = self._streams.get(progress.request_id)
            if stream is not None:
                stream.add(progress)
        for output in result.finished:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.finish(output)
        if self._stepper.failure is not None:
            for stream in self._streams.values():
                stream.fail(StepError(f"the engine has stopped: {self._stepper.failure!r}"))
            self._failed.set()


class _Stream:
    """What one request has got and its reader has not taken yet."""

    def __init__(self, text_makers: list[Detokenizer] | None, only_first: bool) -> None:
        self._text_makers = text_makers
        self._only_first = only_first
        self._has_begun = False
        self._progress: list[Progress] = []
        self._output: RequestOutput | None = None
        self._error: StepError | None = None
        self._changed = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        return self._output is not None or self._error is not None

    def add(self, progress: Progress) -> None:
        if self._text_makers is not None:
            progress = self._with_text(progress)
        if not (self._only_first and self._has_begun):
            self._has_begun = True
            self._progress.append(progress)
            self._changed.set()

    def finish(self, output: RequestOutput) -> None:
        self._output = self._output or (output if self._text_makers is None else self._with_texts(output))
        self._changed.set()

    def fail(self, error: StepError) -> None:
        self._error = error
        self._changed.set()

    async def next(self) -> Event:
        while True:
            if self._progress:
                progress, self._progress = self._progress, []
                return progress
            if self._output is not None:
                return self._output
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()

    def _with_texts(self, output: RequestOutput) -> RequestOutput:
        assert self._text_makers is not None
        completions = [replace(c, text=self._text_makers[c.index].text) for c in output.outputs]
        return replace(output, outputs=completions)

    def _with_text(self, progress: Progress) -> Progress:
        assert self._text_makers is not None
        maker = self._text_makers[progress.index]
        texts = [maker.add(token_id, progress.finish_reason)[0] for token_id in progress.token_ids]
        return replace(progress, text="".join(texts))
