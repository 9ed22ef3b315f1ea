"""Requests over HTTP in closed loops (fixed number of clients) and open loops (Poisson arrivals), and their times."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

TIMEOUT = 600.0


@dataclass(frozen=True)
class Timing:
    """Times of one request, in seconds."""

    arrival: float
    """When it was sent, since the start of the load."""
    tokens: tuple[float, ...]
    """When each event with tokens came, since the request was sent. A token may have no text."""
    total: float
    num_tokens: int
    error: str | None

    @property
    def first(self) -> float:
        return self.tokens[0] if self.tokens else self.total

    @property
    def between(self) -> list[float]:
        return list(np.diff(self.tokens))


@dataclass
class Round:
    """One load in one round."""

    seconds: float
    timings: list[Timing] = field(default_factory=list)


async def closed_loop(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> Round:
    """`clients` clients, each of which asks its next question when it has the answer to its last."""
    jobs = iter(bodies)
    timings: list[Timing] = []
    async with _client(url, clients) as client:
        started = time.perf_counter()

        async def work() -> None:
            for body in jobs:
                timings.append(await _ask(client, body, time.perf_counter() - started))

        await asyncio.gather(*(work() for _ in range(clients)))
        return Round(time.perf_counter() - started, timings)


async def open_loop(url: str, bodies: Sequence[dict[str, Any]], rate: float, seed: int) -> Round:
    """Requests at random times, `rate` per second on average, whether the server keeps up or not."""
    draw = random.Random(seed)
    async with _client(url, len(bodies)) as client:
        started = time.perf_counter()
        tasks = []
        async for body in _arrivals(bodies, rate, draw):
            tasks.append(asyncio.create_task(_ask(client, body, time.perf_counter() - started)))
        timings = await asyncio.gather(*tasks)
        return Round(time.perf_counter() - started, list(timings))


async def _arrivals(bodies: Sequence[dict[str, Any]], rate: float, draw: random.Random) -> AsyncIterator[Any]:
    due = time.perf_counter()
    for body in bodies:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield body
        due += draw.expovariate(rate)


def _client(url: str, connections: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=httpx.Limits(max_connections=connections))


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], arrival: float) -> Timing:
    return await (_ask_stream if body["stream"] else _ask_whole)(client, body, arrival)


async def _ask_whole(client: httpx.AsyncClient, body: dict[str, Any], arrival: float) -> Timing:
    started = time.perf_counter()
    num_tokens, error = 0, None
    try:
        reply = await client.post("/v1/chat/completions", json=body)
        error = None if reply.status_code == 200 else str(reply.status_code)
        num_tokens = 0 if error else reply.json()["usage"]["completion_tokens"]
    except httpx.HTTPError as failure:
        error = repr(failure)
    return Timing(arrival, (), time.perf_counter() - started, num_tokens, error)


async def _ask_stream(client: httpx.AsyncClient, body: dict[str, Any], arrival: float) -> Timing:
    started = time.perf_counter()
    times: list[float] = []
    num_tokens, error = 0, None
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                error = str(reply.status_code)
            async for line in reply.aiter_lines():
                if '"usage":{' in line:
                    num_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                elif '"choices":[{' in line and '"role"' not in line:
                    times.append(time.perf_counter() - started)
                elif line.startswith('data: {"error"'):
                    error = line
    except httpx.HTTPError as failure:
        error = repr(failure)
    return Timing(arrival, tuple(times), time.perf_counter() - started, num_tokens, error)


def summarize(rounds: Sequence[Round], target_first: float, target_between: float) -> dict[str, Any]:
    """Throughput as median and spread over rounds, and latencies over the requests of all rounds."""
    timings = [timing for one in rounds for timing in one.timings]
    good = [t for t in timings if t.error is None]
    rates = [len([t for t in one.timings if t.error is None]) / one.seconds for one in rounds]
    within = [t for t in good if t.first <= target_first and max(t.between, default=0.0) <= target_between]
    per_token = [(t.total - t.first) / (t.num_tokens - 1) for t in good if t.num_tokens > 1]
    return {
        "requests_per_second": spread(rates),
        "tokens_per_second": spread([sum(t.num_tokens for t in one.timings) / one.seconds for one in rounds]),
        "goodput_per_second": len(within) / sum(one.seconds for one in rounds),
        "errors": len(timings) - len(good),
        "ttft_ms": _quantiles([t.first for t in good]),
        "tpot_ms": _quantiles(per_token),
        "itl_ms": _quantiles([gap for t in good for gap in t.between]),
        "e2e_ms": _quantiles([t.total for t in good]),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ms = 1000 * np.asarray(seconds)
    p50, p95, p99 = np.percentile(ms, [50, 95, 99])
    return {"mean": float(ms.mean()), "median": float(p50), "p95": float(p95), "p99": float(p99)}
