"""What one request has got from the engine and its reader has not taken yet."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from dpn_rt.engine.detokenizer import Detokenizer
from dpn_rt.engine.engine import Progress
from dpn_rt.outputs import RequestOutput

Event = list[Progress] | RequestOutput
"""What steps have added since the stream was last read; at the end the whole output."""


class RequestStream:
    """The events of one request. The engine's updates fill it, one reader takes from it, on one event loop."""

    def __init__(self, detokenizers: list[Detokenizer] | None, only_first: bool) -> None:
        """
        Args:
            detokenizers: one per completion; None where the engine makes the text, or no text is made.
            only_first: keep the first progress and the output, for a reader who needs nothing between them.
        """
        self._detokenizers, self._only_first = detokenizers, only_first
        self._has_begun = False
        self._is_left = False
        self._progress: list[Progress] = []
        self._output: RequestOutput | None = None
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether the engine is done with the request."""
        return self._ended.is_set()

    def add(self, progress: Progress) -> None:
        """Takes what a step added to one completion."""
        if self._is_left:
            return
        if self._detokenizers is not None:
            progress = self._with_text(progress, self._detokenizers)
        if not (self._only_first and self._has_begun):
            self._has_begun = True
            self._progress.append(progress)
            self._changed.set()

    def finish(self, output: RequestOutput) -> None:
        """Takes the output, with which the request has ended."""
        self._output = output if self._detokenizers is None else self._with_texts(output, self._detokenizers)
        self._end()

    def fail(self, error: Exception) -> None:
        """Takes the reason why there will be no output."""
        self._error = error
        self._end()

    def leave(self) -> None:
        """The reader has gone: what comes from now on is dropped."""
        self._is_left = True

    async def next(self) -> Event:
        """The next event, as soon as there is one.

        Raises:
            Exception: what `fail` was called with, after all progress has been taken.
        """
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

    async def wait_until_ended(self) -> None:
        """Returns when the engine is done with the request."""
        await self._ended.wait()

    def _end(self) -> None:
        self._ended.set()
        self._changed.set()

    @staticmethod
    def _with_texts(output: RequestOutput, detokenizers: list[Detokenizer]) -> RequestOutput:
        completions = [replace(c, text=detokenizers[c.index].text) for c in output.outputs]
        return replace(output, outputs=completions)

    @staticmethod
    def _with_text(progress: Progress, detokenizers: list[Detokenizer]) -> Progress:
        detokenizer = detokenizers[progress.index]
        texts = [detokenizer.add(token_id, progress.finish_reason)[0] for token_id in progress.token_ids]
        return replace(progress, text="".join(texts))
