"""Load with faults: many clients, some of them hostile, against a running server.

python -m benchmarks.soak --engine DIR --clients 64 --requests 2000

Starts a server, sends requests, and prints as JSON: statuses, wrong answers, latency of /health, memory over time, and
the part of the KV pool that is in use at the end. Fails (exit status 1) if a good request was not answered as `LLM`
answers it, or if there was a server error.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.load.http_questions import Question, data_url, questions
from benchmarks.load.server_process import serving
from benchmarks.load.watch import watch
from dpn_rt.terminal import escape_output

TIMEOUT = 300.0


@dataclass
class Result:
    """The result of a soak."""

    seconds: float = 0.0
    good: int = 0
    wrong: list[str] = field(default_factory=list)
    """Good requests without an answer or with another answer than the library's."""
    hostile: Counter[str] = field(default_factory=Counter)
    """Number of attacks per kind and outcome."""
    server_errors: int = 0
    """Replies with status 500 or above, to good and hostile requests."""
    health_seconds: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    cells_left_in_use: float = 0.0

    @property
    def memory_growth(self) -> float:
        """Growth in the last half: mean of the last tenth over the mean of the tenth after the middle, minus 1."""
        tenth = max(1, len(self.memory_bytes) // 10)
        middle = len(self.memory_bytes) // 2
        return float(np.mean(self.memory_bytes[-tenth:]) / np.mean(self.memory_bytes[middle : middle + tenth]) - 1)

    def summary(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "seconds": self.seconds,
            "good": self.good,
            "wrong": self.wrong[:10],
            "hostile": dict(self.hostile),
            "server_errors": self.server_errors,
            "health_p50_ms": 1000 * float(np.percentile(self.health_seconds, 50)),
            "health_p99_ms": 1000 * float(np.percentile(self.health_seconds, 99)),
            "memory_mb": [round(self.memory_bytes[i] / 2**20) for i in (0, len(self.memory_bytes) // 2, -1)],
            "memory_growth_last_half": self.memory_growth,
            "cells_left_in_use": self.cells_left_in_use,
        }


async def soak(
    url: str,
    pid: int,
    model: str,
    good: list[tuple[Question, str]],
    clients: int,
    requests: int,
    hostile_share: float = 0.05,
) -> Result:
    """Send `requests` requests from `clients` clients.

    Args:
        url: the server.
        pid: process of the server, whose memory is watched.
        model: name of the model in requests.
        good: questions with the answers that `LLM` gives.
        clients: number of clients, each with one request at a time.
        requests: number of requests, hostile ones included.
        hostile_share: share of hostile requests.
    """
    result, draw = Result(), random.Random(0)
    plan: list[Callable[[httpx.AsyncClient], Awaitable[None]]] = []
    for number in range(requests):
        if draw.random() < hostile_share:
            plan.append(_attack(result, model, draw.choice(list(ATTACKS)), good[0][0]))
        else:
            plan.append(_good(result, model, *good[number % len(good)], stream=number % 2 == 0))
    jobs = iter(plan)
    limits = httpx.Limits(max_connections=clients + 8)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:

        async def work() -> None:
            for job in jobs:
                await job(client)

        with _watching(result, url, pid):
            started = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(clients)))
            result.seconds = time.perf_counter() - started
        await asyncio.sleep(0.5)
        result.cells_left_in_use = await _cells_in_use(client)
    return result


def _good(result: Result, model: str, question: Question, expected: str, *, stream: bool) -> Callable[..., Any]:
    async def ask(client: httpx.AsyncClient) -> None:
        body = question.body(model, stream=stream)
        while (reply := await client.post("/v1/chat/completions", json=body)).status_code == 429:
            await asyncio.sleep(float(reply.headers["Retry-After"]))
        result.server_errors += reply.status_code >= 500
        text = _text(reply, stream) if reply.status_code == 200 else f"{reply.status_code} {reply.text[:200]}"
        if text == expected:
            result.good += 1
        else:
            result.wrong.append(f"{question.text!r}: {text!r}, expected {expected!r}")

    return ask


def _text(reply: httpx.Response, stream: bool) -> str:
    if not stream:
        return str(reply.json()["choices"][0]["message"]["content"])
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for event in events for c in event.get("choices", ()))


def _attack(result: Result, model: str, name: str, question: Question) -> Callable[..., Any]:
    async def attack(client: httpx.AsyncClient) -> None:
        outcome = await ATTACKS[name](client, question.body(model))
        result.hostile[f"{name}: {outcome}"] += 1
        result.server_errors += outcome.startswith("5")

    return attack


async def _post(client: httpx.AsyncClient, body: Any) -> str:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = await client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    return str(reply.status_code)


def _with_image(body: dict[str, Any], content: bytes) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": data_url(content)}}
    return {**body, "messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]}


@cache
def _truncated() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()[:4000]


@cache
def _bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


async def _truncated_image(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    return await _post(client, _with_image(body, _truncated()))


async def _decompression_bomb(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    return await _post(client, _with_image(body, _bomb()))


async def _wrong_json(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    return await _post(client, json.dumps(body).encode()[:-7])


async def _long_prompt(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    return await _post(client, {**body, "messages": [{"role": "user", "content": "why " * 50_000}]})


async def _leave_stream(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    long = {**body, "stream": True, "max_tokens": 400, "ignore_eos": True}
    async with client.stream("POST", "/v1/chat/completions", json=long) as reply:
        async for _ in reply.aiter_lines():
            return "left"
    return str(reply.status_code)


async def _leave_early(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    with suppress(httpx.TimeoutException):
        await client.post("/v1/chat/completions", json={**body, "max_tokens": 400, "ignore_eos": True}, timeout=0.05)
    return "left"


ATTACKS: Mapping[str, Callable[[httpx.AsyncClient, dict[str, Any]], Awaitable[str]]] = {
    "truncated image": _truncated_image,
    "decompression bomb": _decompression_bomb,
    "wrong JSON": _wrong_json,
    "over-long prompt": _long_prompt,
    "disconnect in mid-stream": _leave_stream,
    "disconnect before the answer": _leave_early,
}


@contextmanager
def _watching(result: Result, url: str, pid: int) -> Iterator[None]:
    with watch(url, pid) as watcher, watcher.watching() as seen:
        yield
    result.health_seconds, result.memory_bytes = seen["health_seconds"], seen["memory_bytes"]
    result.server_errors += sum(status >= 500 for status in seen["statuses"])


async def _cells_in_use(client: httpx.AsyncClient) -> float:
    text = (await client.get("/metrics")).text
    found = re.search(r"^dpn_rt:kv_cache_usage_perc\{.*\} (\S+)$", text, re.MULTILINE)
    assert found
    return float(found[1])


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    good = questions(options.engine, scenes=10)
    with serving(options.engine) as (url, pid):
        result = asyncio.run(soak(url, pid, options.engine.resolve().name, good, options.clients, options.requests))
    print(json.dumps({**asdict(result), **result.summary(), "health_seconds": None, "memory_bytes": None}, indent=1))
    return 1 if result.wrong or result.server_errors else 0


if __name__ == "__main__":
    sys.exit(main())
