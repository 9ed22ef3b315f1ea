"""A replica: one engine under the same application as `python -m dpn_rt.serve`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

import torch
from ray import serve
from starlette.types import Message

from dpn_rt.engine.loader import load_processor
from dpn_rt.errors import StepError
from dpn_rt.memory import telling_memory
from dpn_rt.ray_serve.messages import REPLICA_HEADER, ForwardedRequest, respond
from dpn_rt.ray_serve.options import ServiceOptions
from dpn_rt.server.app import create_app
from dpn_rt.server.cors import CorsPolicy
from dpn_rt.server.engine_client.messages import EngineSource, LogConfig
from dpn_rt.server.engine_client.process import EngineProcess
from dpn_rt.server.logs import set_up_logs

log = logging.getLogger(__name__)


class Replica:
    """An actor of Ray Serve. Its requests come from the ingress, which has checked host, key and size."""

    def __init__(self, options: ServiceOptions) -> None:
        """Loads the engine, in a process of its own."""
        self._lifespan = AsyncExitStack()
        set_up_logs(options.log_level, as_json=options.log_json)
        self.name = serve.get_replica_context().replica_id.unique_id
        logs = LogConfig(options.log_level, options.log_json)
        source = EngineSource(options.engine, options.device, options.options_of_one, logs)
        with telling_memory(options.engine):  # the command is told the text of an error
            self._process = EngineProcess(source)
            try:
                processor = load_processor(source.path, source.device, source.options, verify=options.verify)
                self._process.wait_until_loaded()
            except BaseException:
                self._process.stop()
                raise
        config = replace(options.server, api_key=None, allowed_hosts=("*",), cors=CorsPolicy())
        self._app = create_app(processor, self._process, config)
        self._service = self._app.state.service
        self._starting = asyncio.Lock()
        self._has_started = False
        torch.set_num_threads(1)  # images are prepared in parallel, and the cores are for the engine
        # What is loaded by now stays. A full pass of the garbage collector over it would stop every stream.
        gc.collect()
        gc.freeze()

    async def respond(self, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        """The parts of the reply to a request, as `messages.respond`, with this replica's name in a header."""
        await self._start()
        async with aclosing(respond(self._app, request)) as parts:
            async for ready in parts:
                self._end_with_engine()  # the reply says no more than that
                yield [self._signed(message) for message in ready]

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that fails, or has ended.

        Raises:
            StepError: the engine stands still.
        """
        await self._start()
        self._end_with_engine()
        engine, limit = self._service.engine, self._service.config.stall_timeout
        if engine.stalled_seconds > limit:
            raise StepError(
                f"the engine has stood still for {engine.stalled_seconds:.0f} s: expected {limit:g} at most"
            )

    async def is_well(self) -> bool:
        """Whether requests can be answered now."""
        await self._start()
        engine, limit = self._service.engine, self._service.config.stall_timeout
        return engine.failure is None and engine.stalled_seconds <= limit

    async def metrics(self) -> tuple[str, str]:
        """The replica's name, and its metrics in Prometheus' format."""
        return self.name, self._service.metrics.text().decode()

    async def process_ids(self) -> tuple[str, int]:
        """The replica's name, and the id of its process on its machine."""
        return self.name, os.getpid()

    async def __del__(self) -> None:
        """Ends the engine's process. Serve awaits this after the last request."""
        await self._lifespan.aclose()

    def _end_with_engine(self) -> None:
        """Ends this process where its engine has stopped.

        Serve sends nothing to a process that has ended, and the ingress gives its requests to other replicas. One that
        lives on without an engine would get requests until it has failed several checks of its health.
        """
        failure = self._service.engine.failure
        if failure is not None:
            log.error("the engine has stopped, and its replica ends: %s", failure)
            os._exit(1)  # Serve would wait for requests that get no answer

    async def _start(self) -> None:
        """Connects to the engine, on the event loop that serves."""
        async with self._starting:
            if not self._has_started:
                await self._lifespan.enter_async_context(self._app.router.lifespan_context(self._app))
                self._has_started = True

    def _signed(self, message: Message) -> Message:
        if message["type"] != "http.response.start":
            return message
        return {**message, "headers": [*message["headers"], (REPLICA_HEADER, self.name.encode())]}
