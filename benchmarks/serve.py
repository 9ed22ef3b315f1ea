"""Load over HTTP in closed loops (fixed number of clients) and open loops (Poisson arrivals), compared with `LLM`.

python -m benchmarks.serve --engine DIR --clients 1 4 16 --rates 5 10 --requests 200 --json serve.json --plot serve.png

All requests stream, except with --whole. Offline is `LLM.chat` on the same questions in one process, decoding of
pictures included. Every round runs all loads; the report gives medians over the rounds with their spread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.http_questions import Question, questions
from benchmarks.result_file import write_json
from benchmarks.soak import serving
from dpn_rt import LLM, SamplingParams
from dpn_rt.terminal import escape_output

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


def _length(mean: int, spread: float, draw: random.Random) -> int:
    return max(1, round(mean * draw.uniform(1 - spread, 1 + spread)))


def offline(llm: LLM, asked: Sequence[Question], *, ignore_eos: bool) -> float:
    """Seconds that `LLM.chat` takes for all questions."""
    params = [SamplingParams(temperature=0, max_tokens=one.max_tokens, ignore_eos=ignore_eos) for one in asked]
    started = time.perf_counter()
    llm.chat([question.messages() for question in asked], params)
    return time.perf_counter() - started


def summarize(rounds: Sequence[Round], target_first: float, target_between: float) -> dict[str, Any]:
    """Throughput as median and spread over rounds, and latencies over the requests of all rounds."""
    timings = [timing for one in rounds for timing in one.timings]
    good = [t for t in timings if t.error is None]
    rates = [len([t for t in one.timings if t.error is None]) / one.seconds for one in rounds]
    within = [t for t in good if t.first <= target_first and max(t.between, default=0.0) <= target_between]
    per_token = [(t.total - t.first) / (t.num_tokens - 1) for t in good if t.num_tokens > 1]
    return {
        "requests_per_second": _spread(rates),
        "tokens_per_second": _spread([sum(t.num_tokens for t in one.timings) / one.seconds for one in rounds]),
        "goodput_per_second": len(within) / sum(one.seconds for one in rounds),
        "errors": len(timings) - len(good),
        "ttft_ms": _quantiles([t.first for t in good]),
        "tpot_ms": _quantiles(per_token),
        "itl_ms": _quantiles([gap for t in good for gap in t.between]),
        "e2e_ms": _quantiles([t.total for t in good]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ms = 1000 * np.asarray(seconds)
    p50, p95, p99 = np.percentile(ms, [50, 95, 99])
    return {"mean": float(ms.mean()), "median": float(p50), "p95": float(p95), "p99": float(p99)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all loads, round by round."""
    asked = [question for question, _ in questions(options.engine, options.scenes, options.max_tokens)]
    draw = random.Random(0)
    asked = [
        replace(asked[i % len(asked)], max_tokens=_length(options.max_tokens, options.spread, draw))
        for i in range(options.requests)
    ]
    name = options.engine.resolve().name
    extra: dict[str, Any] = {"stream": not options.whole, "ignore_eos": options.ignore_eos}
    if not options.whole:
        extra["stream_options"] = {"include_usage": True}
    bodies = [question.body(name, **extra) for question in asked]
    loads: dict[str, list[Round]] = {}
    offline_seconds: list[float] = []
    llm = LLM(options.engine, max_num_seqs=options.offline_seqs)
    with serving(options.engine) as (url, _):
        asyncio.run(closed_loop(url, bodies[:16], 4))  # warm up
        for number in range(options.rounds):
            for clients in options.clients:
                loads.setdefault(f"{clients} clients", []).append(asyncio.run(closed_loop(url, bodies, clients)))
            for rate in options.rates:
                loads.setdefault(f"{rate:g}/s", []).append(asyncio.run(open_loop(url, bodies, rate, number)))
            offline_seconds.append(offline(llm, asked, ignore_eos=options.ignore_eos))
    return {
        "requests": options.requests,
        "rounds": options.rounds,
        "max_tokens": options.max_tokens,
        "spread": options.spread,
        "ignore_eos": options.ignore_eos,
        "whole": options.whole,
        "offline_seqs": options.offline_seqs,
        "target_ms": {"ttft": 1000 * options.target_first, "itl": 1000 * options.target_between},
        "offline_requests_per_second": _spread([options.requests / seconds for seconds in offline_seconds]),
        "loads": {
            load: summarize(rounds, options.target_first, options.target_between) for load, rounds in loads.items()
        },
    }


def report(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| load | requests/s | TTFT ms median / p99 | TPOT ms median | ITL ms median / p99 | E2E ms median / p99 "
        "| errors |",
        "|---|---|---|---|---|---|---|",
    ]
    for load, seen in result["loads"].items():
        rate, first, total = seen["requests_per_second"], seen["ttft_ms"], seen["e2e_ms"]
        between = seen["itl_ms"] or {"median": 0.0, "p99": 0.0}
        lines.append(
            f"| {load} | {rate['median']:.1f} ({rate['min']:.1f} - {rate['max']:.1f}) "
            f"| {first['median']:.0f} / {first['p99']:.0f} | {(seen['tpot_ms'] or {'median': 0.0})['median']:.1f} "
            f"| {between['median']:.1f} / {between['p99']:.1f} | {total['median']:.0f} / {total['p99']:.0f} "
            f"| {seen['errors']} |"
        )
    offline_rate = result["offline_requests_per_second"]
    lines.append(
        f"| offline `LLM.chat` | {offline_rate['median']:.1f} ({offline_rate['min']:.1f} - "
        f"{offline_rate['max']:.1f}) | | | | | |"
    )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot the time to the first token against throughput."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for load, seen in result["loads"].items():
        x, y = seen["requests_per_second"]["median"], seen["ttft_ms"]
        axes.errorbar(x, y["median"], yerr=[[0], [y["p99"] - y["median"]]], marker="o", capsize=3, color="C0")
        axes.annotate(load, (x, y["median"]), textcoords="offset points", xytext=(6, 4))
    axes.axvline(result["offline_requests_per_second"]["median"], linestyle=":", color="C1", label="offline")
    axes.set(xlabel="requests per second", ylabel="time to first token, ms (median, p99)", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--rates", type=float, nargs="*", default=[])
    parser.add_argument("--offline-seqs", type=int, default=64, help="max_num_seqs of the offline run")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--spread", type=float, default=0.0, help="of max-tokens over requests, as a share of it")
    parser.add_argument("--whole", action="store_true", help="replies in one piece; first token then means all")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of max-tokens, whatever the model says")
    parser.add_argument("--target-first", type=float, default=0.5, help="seconds, for goodput")
    parser.add_argument("--target-between", type=float, default=0.1, help="seconds, for goodput")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    result = measure(options)
    print(report(result))
    if options.json:
        write_json(options.json, result)
    if options.plot:
        plot(result, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
