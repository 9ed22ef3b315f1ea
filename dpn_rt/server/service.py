"""A request from its body to its reply, without HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from dpn_rt.errors import DpnError
from dpn_rt.format.config import ModelConfig
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.server.admission import Admission, Ticket
from dpn_rt.server.config import ServerConfig
from dpn_rt.server.engine_client.client import EngineClient
from dpn_rt.server.engine_client.stream import Event
from dpn_rt.server.errors import HttpError, error_reply
from dpn_rt.server.gen_ai import GenAiMetrics
from dpn_rt.server.json_body import Bytes, read_json
from dpn_rt.server.merge import merge
from dpn_rt.server.metrics import Metrics
from dpn_rt.server.preparation import Preparation
from dpn_rt.server.protocol import ChatRequest, CompletionRequest, Conversation, NamesModel
from dpn_rt.server.reductions import Reductions
from dpn_rt.server.replies import Json, Replies, pyramid, sse, timings, token_counts, usage
from dpn_rt.server.reply_stream import ReplyStream
from dpn_rt.server.tokenization import DetokenizeRequest, Tokenization, TokenizeRequest
from dpn_rt.server.tracing import Tracing

LONG_BODY = 2**16
"""Bytes. A body of at least this size is parsed in a thread, so that the event loop is not blocked."""
Request = ChatRequest | CompletionRequest
Parsed = TypeVar("Parsed", bound=NamesModel)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """Serves requests with one engine."""

    config: ServerConfig
    model: ModelConfig
    engine: EngineClient
    preparation: Preparation
    admission: Admission
    metrics: Metrics
    reductions: Reductions
    reader: Executor
    """Parses long bodies, one at a time: for some tens of milliseconds nothing else runs."""
    tracing: Tracing | None = None
    gen_ai_metrics: GenAiMetrics | None = None

    async def parse(self, kind: type[Parsed], body: Bytes) -> Parsed:
        """The request in a body.

        Raises:
            ValidationError: it is not a request of this kind; HttpError: it is not JSON, has far too many values, or
                names another model.
        """
        if len(body) < LONG_BODY:
            request = _parsed(kind, body)
        else:
            request = await asyncio.get_running_loop().run_in_executor(self.reader, _parsed, kind, body)
        expected = self.config.model_name
        if request.model not in (None, expected):
            message = f"model {str(request.model)[:80]!r:.80}: expected {expected!r}"
            raise HttpError(404, message, param="model", code="model_not_found")
        return request

    async def tokens(self, request: TokenizeRequest) -> Json:
        """The reply to `POST /tokenize`. A conversation has a place in the queue while its images are prepared."""
        tokenization = Tokenization(self.preparation)
        if request.conversation is None:
            return await tokenization.tokens(request)
        with self._enter(request.conversation):
            return await tokenization.tokens(request)

    async def text(self, request: DetokenizeRequest) -> Json:
        """The reply to `POST /detokenize`."""
        return await Tokenization(self.preparation).text(request)

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
            outputs, usage=usage(prompts, outputs), **self._extra(prompts[0], outputs[0])
        )

    async def stream(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The reply as server-sent events. An error of the request is raised before the first of them."""
        request_id = uuid.uuid4().hex
        with self._enter(request) as ticket:
            prompts = await self._prepare(request)
            replies = self._replies(request, request_id)
            reply_stream = ReplyStream(
                replies,
                len(prompts),
                request.completions,
                extra=lambda position, output: self._extra(prompts[position], output),
                usage=_usage_so_far(request, prompts),
            )
            runs = [self._events(f"{request_id}-{i}", p, request, ticket) for i, p in enumerate(prompts)]
            try:
                async with aclosing(merge(runs)) as events:
                    async for position, event in events:
                        for chunk in reply_stream.take(position, event):
                            yield sse(chunk)
            except DpnError as error:
                if not reply_stream.has_begun:
                    raise
                log.warning("request %s: %s", request_id, error)
                yield sse(error_reply(error).body)
            else:
                if request.wants_usage:
                    yield sse(replies.usage_chunk(usage(prompts, reply_stream.outputs)))
            yield sse("[DONE]")

    def _enter(self, request: Request | Conversation) -> AbstractContextManager[Ticket]:
        """Checks a request without decoding anything, then takes its places in the queue."""
        if isinstance(request, Request):
            self._check_priority(request)
        self.preparation.check(request)
        tokens = self.preparation.estimated_tokens(request)
        answers = request.completions if isinstance(request, Request) else 1
        return self.admission.enter(tokens, request.num_prompts, answers)

    def _check_priority(self, request: Request) -> None:
        if request.priority and not self.config.allow_client_priority:
            raise HttpError(
                400,
                f"priority={request.priority}: expected 0 or none, since this server takes none from its clients (see "
                "its option --allow-client-priority)",
                param="priority",
            )

    def _extra(self, prompt: ProcessedPrompt, output: RequestOutput) -> Json:
        return {"pyramid": pyramid(self.model, prompt, output), "timings": timings(output)}

    async def _prepare(self, request: Request) -> list[ProcessedPrompt]:
        started = time.monotonic()
        if isinstance(request, ChatRequest):
            prompts = [await self.preparation.chat(request)]
        else:
            prompts = await self.preparation.text(request)
        self.metrics.observe_preparation(time.monotonic() - started)
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
                    self.metrics.observe_mean_gap(event)
                    return event
        raise AssertionError("a stream ends with an output")

    async def _events(
        self, request_id: str, prompt: ProcessedPrompt, request: Request, ticket: Ticket, *, only_first: bool = False
    ) -> AsyncGenerator[Event, None]:
        """The engine's events of one prompt; counts and traces them, and gives the prompt's place in the queue back."""
        record_gap = self.metrics.gap_timer()
        events = self.engine.stream(request_id, prompt, request.sampling, request.priority or 0, only_first=only_first)
        is_waiting, has_ended = True, False
        try:
            async with aclosing(events):
                async for event in events:
                    if is_waiting:
                        is_waiting = False
                        ticket.leave()
                    if isinstance(event, RequestOutput):
                        has_ended = True
                        self.metrics.count_finished(prompt, event)
                        self._report(prompt, event, request)
                    else:
                        record_gap(event)
                    yield event
        except (GeneratorExit, asyncio.CancelledError):
            if not has_ended:
                self.metrics.count_client_left(request.completions)
            raise

    def _report(self, prompt: ProcessedPrompt, output: RequestOutput, request: Request) -> None:
        for observer in (self.tracing, self.gen_ai_metrics):
            if observer is not None:
                is_chat = isinstance(request, ChatRequest)
                observer.record_finished(prompt, output, "chat" if is_chat else "text_completion")

    def _replies(self, request: Request, request_id: str) -> Replies:
        return Replies(
            request_id,
            self.config.model_name,
            is_chat=isinstance(request, ChatRequest),
            top_logprobs=(request.top_logprobs or 0) if isinstance(request, ChatRequest) else 0,
            tokenizer=self.preparation.tokenizer,
            skip_special_tokens=request.sampling.skip_special_tokens,
        )


def _usage_so_far(request: Request, prompts: list[ProcessedPrompt]) -> Callable[[int], Json | None] | None:
    """See `ReplyStream`. Where the usage comes at the end alone, the other chunks say so, as OpenAI's do."""
    if not request.wants_usage:
        return None
    return partial(token_counts, prompts) if request.wants_continuous_usage else lambda _: None


def _parsed(kind: type[Parsed], body: Bytes) -> Parsed:
    # Not `model_validate_json`: it copies strings several times, and all of them again for an error.
    return kind.model_validate(read_json(body))
