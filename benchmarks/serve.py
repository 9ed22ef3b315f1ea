"""Load over HTTP in closed loops (fixed number of clients) and open loops (Poisson arrivals), compared with `LLM`.

python -m benchmarks.serve --engine DIR --clients 1 4 16 --rates 5 10 --requests 200 --json serve.json --plot serve.png

All requests stream, except with --whole. Offline is `LLM.chat` on the same questions in one process, decoding of
pictures included. Every round runs all loads; the report gives medians over the rounds with their spread.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.load.http_questions import Question, questions
from benchmarks.load.loops import Round, closed_loop, open_loop, spread, summarize
from benchmarks.load.server_process import serving
from benchmarks.measuring.result_file import write_json
from dpn_rt import LLM, SamplingParams
from dpn_rt.terminal import escape_output


def _length(mean: int, spread: float, draw: random.Random) -> int:
    return max(1, round(mean * draw.uniform(1 - spread, 1 + spread)))


def offline(llm: LLM, asked: Sequence[Question], *, ignore_eos: bool) -> float:
    """Seconds that `LLM.chat` takes for all questions."""
    params = [SamplingParams(temperature=0, max_tokens=one.max_tokens, ignore_eos=ignore_eos) for one in asked]
    started = time.perf_counter()
    llm.chat([question.messages() for question in asked], params)
    return time.perf_counter() - started


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
        "offline_requests_per_second": spread([options.requests / seconds for seconds in offline_seconds]),
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
