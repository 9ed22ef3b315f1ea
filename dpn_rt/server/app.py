"""HTTP: paths, headers, statuses."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from dpn_rt.errors import DpnError
from dpn_rt.format.config import ReductionConfig
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.prompts.processor import Processor
from dpn_rt.server.admission import Admission
from dpn_rt.server.config import ServerConfig
from dpn_rt.server.engine_client.client import EngineClient
from dpn_rt.server.engine_client.process import EngineProcess
from dpn_rt.server.errors import HttpError, error_reply
from dpn_rt.server.gen_ai import GenAiMetrics
from dpn_rt.server.guards import guards
from dpn_rt.server.media.loader import MediaLoader
from dpn_rt.server.metrics import Metrics
from dpn_rt.server.otlp import close_in_time
from dpn_rt.server.page.document import page_text
from dpn_rt.server.preparation import Preparation
from dpn_rt.server.processed_image_cache import ProcessedImageCache
from dpn_rt.server.protocol import ChatRequest, CompletionRequest
from dpn_rt.server.reductions import Reductions
from dpn_rt.server.replies import encoded
from dpn_rt.server.service import Service
from dpn_rt.server.tokenization import DetokenizeRequest, TokenizeRequest
from dpn_rt.server.tracing import Tracing
from dpn_rt.server.unknown_paths import in_own_words

Body = TypeVar("Body", bound=BaseModel)
log = logging.getLogger(__name__)


def create_app(
    processor: Processor,
    process: EngineProcess,
    config: ServerConfig,
    tracing: Tracing | None = None,
    gen_ai_metrics: GenAiMetrics | None = None,
) -> FastAPI:
    """The HTTP application. Its startup connects to the engine, its shutdown ends the engine's process.

    Args:
        processor: makes prompts for the engine.
        process: has loaded the engine.
    """
    workers = ThreadPoolExecutor(config.workers, thread_name_prefix="dpn_rt-worker")
    reader = ThreadPoolExecutor(1, thread_name_prefix="dpn_rt-reader")
    media = MediaLoader(config.media, reader=reader)
    engine = EngineClient(process, processor.tokenizer)
    reductions = Reductions.of(processor.model, config.reduce)
    service = Service(
        config,
        processor.model,
        engine,
        Preparation(processor, media, ProcessedImageCache(config.processed_image_bytes), workers),
        Admission(config.max_queued_requests, config.max_queued_tokens),
        Metrics(config.model_name, lambda: engine.load, reductions),
        reductions,
        reader,
        tracing,
        gen_ai_metrics,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()
            await media.close()
            observers = (tracing, gen_ai_metrics)
            await asyncio.to_thread(close_in_time, [each.close for each in observers if each is not None])
            for executor in (reader, workers):
                executor.shutdown(cancel_futures=True)

    app = FastAPI(
        title="dpn_rt",
        version=VERSION,
        description="OpenAI-compatible server for multimodal LLMs that pool visual tokens inside the decoder.",
        lifespan=lifespan,
    )
    app.state.service = service
    _add_middlewares(app, service)
    _add_error_handlers(app, service)
    _add_openai_paths(app, service)
    _add_tokenization_paths(app, service)
    _add_operator_paths(app, service)
    if tracing is not None:
        tracing.watch(app)
    return app


def _add_openai_paths(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_body_schema(ChatRequest), responses=ERRORS)
    async def chat(request: Request) -> Response:
        """Answer a conversation, with an image or without."""
        return await _respond(service, request, ChatRequest)

    @app.post("/v1/completions", openapi_extra=_body_schema(CompletionRequest), responses=ERRORS)
    async def completions(request: Request) -> Response:
        """Continue text as it stands."""
        return await _respond(service, request, CompletionRequest)

    @app.get("/v1/models")
    async def models() -> Any:
        """The model that is served."""
        return {"object": "list", "data": [_model_card(service)]}

    @app.get("/v1/models/{name:path}", responses={404: {"description": "a model of another name"}})
    async def model(name: str) -> Any:
        """The model, by its name."""
        if name != service.config.model_name:
            raise HttpError(404, f"model {name!r:.80}: expected {service.config.model_name!r}", code="model_not_found")
        return _model_card(service)


def _add_tokenization_paths(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", openapi_extra=_body_schema(TokenizeRequest), responses=ERRORS)
    async def tokenize(request: Request) -> Response:
        """The ids of a text, or of a conversation."""
        reply = await service.tokens(await service.parse(TokenizeRequest, await _json_body(request)))
        return Response(await service.preparation.run(encoded, reply), media_type="application/json")

    @app.post("/detokenize", openapi_extra=_body_schema(DetokenizeRequest), responses=ERRORS)
    async def detokenize(request: Request) -> Response:
        """The text of ids."""
        reply = await service.text(await service.parse(DetokenizeRequest, await _json_body(request)))
        return Response(await service.preparation.run(encoded, reply), media_type="application/json")


def _add_operator_paths(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: {"description": "the engine is stalled, or the server is shutting down"}})
    async def health() -> Response:
        """200 while the engine steps or has nothing to do."""
        seconds = service.engine.stalled_seconds
        if service.admission.is_closed:
            return JSONResponse({"status": "shutting down"}, 503)
        if seconds > service.config.stall_timeout:
            return JSONResponse({"status": "stalled", "seconds": min(seconds, 1e9)}, 503)  # JSON has no infinity
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> Any:
        """The server's version."""
        return {"version": VERSION}

    text = page_text()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(text, headers=PAGE_HEADERS)


async def _json_body(request: Request) -> bytearray:
    """The body, if it says that it is JSON.

    Any page may post text or forms to any server. For JSON a browser asks first, and this server says no (CORS).
    """
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise HttpError(415, f"Content-Type {given!r:.80}: expected application/json")
    body = bytearray()
    async for part in request.stream():  # `request.body()` would keep all parts, and then the body
        body += part
    return body


async def _respond(service: Service, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
    request_id = request.state.request_id
    started = time.monotonic()
    parsed = await service.parse(kind, await _json_body(request))
    if parsed.stream:
        events = service.stream(parsed)
        # Before the response begins, so that an error still has a status of its own.
        first = await _until_disconnected(request, anext(events))
        content = _with_first(first, events, request_id, started)
        return StreamingResponse(content, media_type="text/event-stream", headers=NO_BUFFERING)
    reply = await _until_disconnected(request, service.whole(parsed))
    log.info("request %s: answered in %.3f s", request_id, time.monotonic() - started)
    return JSONResponse(reply)


async def _with_first(
    first: bytes, events: AsyncGenerator[bytes, None], request_id: str, started: float
) -> AsyncIterator[bytes]:
    """All events, of which the first has been read already. Closes them when the client leaves; logs how they ended."""
    end = "the client left the stream after"
    try:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event
        end = "streamed in"
    finally:
        log.info("request %s: %s %.3f s", request_id, end, time.monotonic() - started)


async def _until_disconnected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError(499, "the client closed the connection")
        return task.result()
    finally:
        for future in (task, disconnected):
            future.cancel()
            with suppress(BaseException):
                await future


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ClientLeftError(HttpError):
    """The client has left, so no reply is read."""


def _add_middlewares(app: FastAPI, service: Service) -> None:
    for layer in guards(service.config, service.metrics.count_refusal):
        app.add_middleware(layer.cls, *layer.args, **layer.kwargs)


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        reply = error_reply(in_own_words(error, request) if isinstance(error, HTTPException) else error)
        if not isinstance(error, ClientLeftError):  # that is no refusal
            service.metrics.count_refusal(reply.status)
        request_id = getattr(request.state, "request_id", "-")
        if reply.status >= 500 and reply.status != 503:
            log.error("request %s: %s", request_id, reply.body["error"]["message"], exc_info=error)
        else:
            log.info("request %s: %d %s", request_id, reply.status, reply.body["error"]["message"])
        return JSONResponse(reply.body, reply.status, reply.headers)

    for kind in (DpnError, ValidationError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, handle)


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.config.model_name,
        "object": "model",
        "created": int(START),
        "owned_by": "dpn_rt",
        "root": service.config.model_name,  # for vLLM's clients
        "parent": None,
        "max_model_len": service.preparation.max_model_len,
        "pooling_kernels": _pooling_kernels(service.model.reduction),
        "reductions": service.reductions.choices,
    }


def _pooling_kernels(reduction: ReductionConfig) -> list[list[tuple[int, int]]]:
    """The kernels that a route can force, per boundary, by the number of their expert."""
    if not isinstance(reduction, PoolingConfig):
        return []
    return [list(boundary.kernels) for boundary in reduction.boundaries]


def _body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The request body's part of OpenAPI's schema. FastAPI cannot make it, since the paths read bodies themselves."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema, definitions)}}}
    }


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema with its definitions in the places that refer to them."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items() if key != "discriminator"}


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "a part of the request cannot be served; `error.message` says which and why"},
    401: {"description": "the API key is missing or wrong"},
    404: {"description": "a model of another name"},
    413: {"description": "body or image too large"},
    415: {"description": "the body is not application/json"},
    429: {"description": "the queue is full; see Retry-After"},
    503: {"description": "the server is shutting down; see Retry-After"},
}
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Tells proxies to pass events on as they come."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
START = time.time()
VERSION = importlib.metadata.version("dpn_rt")
