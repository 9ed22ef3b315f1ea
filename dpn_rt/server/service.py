"""One request from its body to its reply, without HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel

from dpn_rt.errors import DpnError
from dpn_rt.format.config import ModelConfig
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.server import replies
from dpn_rt.server.admission import Admission, Ticket
from dpn_rt.server.config import ServerConfig
from dpn_rt.server.engine_client.client import EngineClient
from dpn_rt.server.engine_client.stream import Event
from dpn_rt.server.errors import HttpError, reply
from dpn_rt.server.merge import merge
from dpn_rt.server.metrics import Metrics
from dpn_rt.server.preparation import Preparation
from dpn_rt.server.protocol import ChatRequest, CompletionRequest
from dpn_rt.server.replies import Json, Replies, sse
from dpn_rt.server.reply_stream import ReplyStream
from dpn_rt.server.tracing import Tracing

LONG_BODY = 2**16
"""Bytes from which on a body is parsed in a worker thread, so that the event loop does not stand still."""
Request = ChatRequest | CompletionRequest
Parsed = TypeVar("Parsed", bound=BaseModel)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What answers requests."""

    config: ServerConfig
    model: ModelConfig
    engine: EngineClient
    preparation: Preparation
    admission: Admission
    metrics: Metrics
    tracing: Tracing | None = None

    async def parse(self, kind: type[Parsed], body: bytes) -> Parsed:
        """A request's body.

        Raises:
            ValidationError: it is no JSON, or not of this kind; HttpError: another model is asked for.
        """
        if len(body) < LONG_BODY:
            request = kind.model_validate_json(body)
        else:
            request = await self.preparation.run(kind.model_validate_json, body)
        name = getattr(request, "model", self.config.model_name)
        if name != self.config.model_name:
            raise HttpError(
                404, f"model {name!r:.80}: expected {self.config.model_name!r}", param="model", code="model_not_found"
            )
        return request

    async def whole(self, request: Request) -> Json:
        """The reply to a request that does not stream."""
        request_id = uuid.uuid4().hex
        with self._enter(request) as ticket:
            prompts = await self._prepare(request)
            runs = [
                asyncio.ensure_future(self._output(f"{request_id}-{i}", prompt, request, ticket))
                for i, prompt in enumerate(prompts)
            ]
            try:
                outputs = await asyncio.gather(*runs)
            finally:
                for run in runs:
                    run.cancel()
        return self._replies(request, request_id).whole(
            outputs, usage=replies.usage(prompts, outputs), **self._extra(prompts[0], outputs[0])
        )

    async def stream(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Server-sent events. What is wrong with the request is raised before the first of them."""
        request_id = uuid.uuid4().hex
        with self._enter(request) as ticket:
            prompts = await self._prepare(request)
            answers = self._replies(request, request_id)
            stream = ReplyStream(
                answers,
                len(prompts),
                request.completions,
                extra=lambda position, output: self._extra(prompts[position], output),
            )
            runs = [self._events(f"{request_id}-{i}", p, request, ticket) for i, p in enumerate(prompts)]
            try:
                async with aclosing(merge(runs)) as events:
                    async for position, event in events:
                        for chunk in stream.take(position, event):
                            yield sse(chunk)
            except DpnError as error:
                if not stream.has_begun:
                    raise
                log.warning("request %s: %s", request_id, error)
                yield sse(reply(error).body)
            else:
                if request.wants_usage:
                    yield sse(answers.usage_chunk(replies.usage(prompts, stream.outputs)))
            yield sse("[DONE]")

    def _enter(self, request: Request) -> AbstractContextManager[Ticket]:
        """Places in the queue for a request that is right as far as can be told."""
        self.preparation.check(request)
        prompts = len(request.prompts) if isinstance(request, CompletionRequest) else 1
        return self.admission.enter(self.preparation.estimated_tokens(request), prompts)

    def _extra(self, prompt: ProcessedPrompt, output: RequestOutput) -> Json:
        return {"pyramid": replies.pyramid(self.model, prompt, output), "timings": replies.timings(output)}

    async def _prepare(self, request: Request) -> list[ProcessedPrompt]:
        started = time.monotonic()
        if isinstance(request, ChatRequest):
            prompts = [await self.preparation.chat(request)]
        else:
            prompts = await self.preparation.text(request)
        self.metrics.prepared(time.monotonic() - started)
        return prompts

    async def _output(
        self, request_id: str, prompt: ProcessedPrompt, request: Request, ticket: Ticket
    ) -> RequestOutput:
        events = self._events(request_id, prompt, request, ticket, only_first=True)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, RequestOutput):
                    if event.error is not None:
                        raise event.error
                    self.metrics.paced(event)
                    return event
        raise AssertionError("a stream ends with its output")

    async def _events(
        self, request_id: str, prompt: ProcessedPrompt, request: Request, ticket: Ticket, *, only_first: bool = False
    ) -> AsyncGenerator[Event, None]:
        params: SamplingParams = request.sampling
        tick: Callable[[int], None] = self.metrics.clock()
        events = self.engine.stream(request_id, prompt, params, request.priority, only_first=only_first)
        waits, has_ended = True, False
        try:
            async with aclosing(events):
                async for event in events:
                    if waits:
                        waits = False
                        ticket.leave()
                    if isinstance(event, RequestOutput):
                        has_ended = True
                        self.metrics.finished(prompt, event)
                        if self.tracing is not None:
                            self.tracing.finished(prompt, event)
                    else:
                        tick(len(event))
                    yield event
        except (GeneratorExit, asyncio.CancelledError):
            if not has_ended:
                self.metrics.left(request.completions)
            raise

    def _replies(self, request: Request, request_id: str) -> Replies:
        is_chat = isinstance(request, ChatRequest)
        top = (request.top_logprobs or 0) if isinstance(request, ChatRequest) else 0
        return Replies(
            request_id, self.config.model_name, is_chat=is_chat, top_logprobs=top, tokenizer=self.preparation.tokenizer
        )
