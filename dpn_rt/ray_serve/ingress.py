"""The ingress: checks requests, chooses a replica for each by its image, and passes the reply on."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpn_rt.ray_serve.image_key import image_key
from dpn_rt.ray_serve.messages import REQUEST_ID_HEADER, ForwardedRequest
from dpn_rt.ray_serve.metrics import merged
from dpn_rt.ray_serve.options import ServiceOptions
from dpn_rt.server.config import ServerConfig
from dpn_rt.server.errors import HttpError, OverloadedError
from dpn_rt.server.guards import guarded
from dpn_rt.server.service import LONG_BODY

RETRIES = 2
"""Other replicas that a request is sent to after one has died before it answered. Requests only read, so they can be
repeated; not for ever, since a request may be what a replica dies of."""
SECONDS_FOR_OPERATORS = 5.0
"""For replicas to say how they are."""
log = logging.getLogger(__name__)


class ReplicaDiedError(HttpError):
    """A replica has died with a request that cannot be given to another one."""

    def __init__(self) -> None:
        message = "the replica that made this answer has died: ask again, another one will make it"
        super().__init__(502, message, code="replica_died")


class Forwarder:
    """An ASGI application whose replies come from replicas."""

    def __init__(self, replicas: DeploymentHandle[Any], config: ServerConfig) -> None:
        self._replicas, self._config = replicas, config
        self.counts: Counter[str] = Counter()
        """Requests that were refused here by status, and `retried`."""
        self._running: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def count_refusal(self, status: int) -> None:
        """Counts a request that was refused before it reached a replica."""
        self.counts[str(status)] += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or a message about the life of the process."""
        if scope["type"] == "lifespan":
            await _acknowledge(receive, send)
        elif scope["method"] == "GET" and scope["path"] == "/metrics":
            await _send(send, 200, CONTENT_TYPE_LATEST, await self._metrics())
        elif self._is_closed:
            raise OverloadedError("the service is shutting down: try another one", status=503)
        elif scope["method"] == "GET" and scope["path"] == "/health":
            await self._health(send)
        else:
            task = asyncio.create_task(self._answer(scope, receive, send))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            await task

    async def drain(self) -> None:
        """Refuses new requests with 503, and ends when none runs any more; `shutdown_timeout` ends those that are left.

        Serve takes away the route of an application that is deleted: without this, new requests would get 404
        meanwhile.
        """
        self._is_closed = True
        if not self._running:
            return
        _, left = await asyncio.wait(self._running, timeout=self._config.shutdown_timeout)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await ForwardedRequest.read(scope, receive)
        await _while_connected(receive, self._forward(request, send))

    async def _forward(self, request: ForwardedRequest, send: Send) -> None:
        """Passes a reply on.

        Raises:
            HttpError: no replica has answered, or the one that had begun to has died.
        """
        key = await _key(request)
        for attempt in range(1 + RETRIES):
            parts: Any = self._replicas.options(method_name="respond", stream=True, session_id=key).remote(request)
            has_begun = has_ended = False
            try:
                async for ready in parts:
                    has_begun = True
                    for message in ready:
                        await send(message)
                has_ended = True
                return
            except RayActorError as error:
                log.warning("a replica has died with a request: %s", type(error).__name__)
                if has_begun or attempt == RETRIES:
                    raise ReplicaDiedError from None
                self.counts["retried"] += 1
            except BackPressureError:
                waiting = self._config.max_queued_requests
                raise OverloadedError(f"all replicas are busy, and {waiting} requests wait for one") from None
            except DeploymentUnavailableError:
                raise OverloadedError("no replica can be started; the logs of Serve say why", status=503) from None
            finally:
                if not has_ended:
                    parts.cancel()

    async def _health(self, send: Send) -> None:
        """200 while a replica is well."""
        answers = await self._ask_all("is_well")
        well = sum(answer is True for answer in answers)
        if not well:
            raise HttpError(503, f"none of {len(answers)} replicas is well", code="overloaded")
        await _send(send, 200, "application/json", b'{"status":"ok","replicas":%d}' % well)

    async def _metrics(self) -> bytes:
        texts: dict[str, str] = dict(answer for answer in await self._ask_all("metrics") if isinstance(answer, tuple))
        return merged(texts) + self._own_metrics()

    def _own_metrics(self) -> bytes:
        lines = [
            "# HELP dpn_rt:ingress_requests_retried_total Requests sent to another replica after one had died.",
            "# TYPE dpn_rt:ingress_requests_retried_total counter",
            f"dpn_rt:ingress_requests_retried_total {self.counts['retried']}",
            "# HELP dpn_rt:ingress_request_refused_total Requests refused before a replica, by status.",
            "# TYPE dpn_rt:ingress_request_refused_total counter",
        ]
        for status in sorted(set(self.counts) - {"retried"}):
            lines.append(f'dpn_rt:ingress_request_refused_total{{status="{status}"}} {self.counts[status]}')
        return "".join(f"{line}\n" for line in lines).encode()

    async def _ask_all(self, method: str) -> list[Any]:
        """The answers of all replicas, or what was raised instead of one; empty where there is none."""
        try:
            answers = self._replicas.broadcast(method)
            return await answers.results_async(timeout_s=SECONDS_FOR_OPERATORS, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            return []


@serve.ingress()
class Ingress:
    """An actor of Ray Serve without a state that would be missed."""

    def __init__(self, replicas: DeploymentHandle[Any], options: ServiceOptions) -> None:
        self._forwarder, self._config = Forwarder(replicas, options.server), options.server

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve."""
        return application(self._forwarder, self._config)

    async def drain(self) -> None:
        """As `Forwarder.drain`; called by the command when it is told to end."""
        await self._forwarder.drain()


def application(forwarder: Forwarder, config: ServerConfig) -> ASGIApp:
    """A forwarder inside of the server's checks. Its replies have no request id, since Serve's proxy adds it."""
    inner = guarded(forwarder, config, forwarder.count_refusal)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            await send(_without_request_id(message))

        await inner(scope, receive, send_without_id)

    return app


async def _key(request: ForwardedRequest) -> str:
    if len(request.body) < LONG_BODY:
        return image_key(request.body)
    return await asyncio.to_thread(image_key, request.body)


async def _while_connected(receive: Receive, work: Any) -> None:
    """Does `work`, and gives it up when the client leaves."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for future in (task, left):
            future.cancel()
            with suppress(BaseException):
                await future


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _without_request_id(message: Message) -> Message:
    """A part of a reply without the id of the request."""
    if message["type"] != "http.response.start":
        return message
    return {**message, "headers": [header for header in message["headers"] if header[0] != REQUEST_ID_HEADER]}


async def _send(send: Send, status: int, media_type: str, body: bytes) -> None:
    headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _acknowledge(receive: Receive, send: Send) -> None:
    """Start and end of the process, for which there is nothing to do."""
    for _ in range(2):
        await send({"type": f"{(await receive())['type']}.complete"})
