"""How many replicas, and how many bytes between machines, for a rate of requests: from measured times of one replica.

    python -m benchmarks.capacity --result benchmarks/results/llava-1b-cpu-quantized.json --rates 10 1000 100000

A replica takes requests one after the other: tower, prefill, and its share of decode steps. Requests arrive at random
(Poisson) and go to any free replica (Erlang C); their times vary little, which halves the wait (Allen and Cunneen).
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models.shapes import SHAPES
from dpn_rt.terminal import escape_output


@dataclass(frozen=True)
class Load:
    """What a request is."""

    answer_tokens: int
    image_bytes: int
    """As the client sends it."""
    decode_batch: int
    """Answers that a replica decodes together; a step of several takes as long as one until products outweigh reads."""


@dataclass(frozen=True)
class Replica:
    """Measured seconds of one request on one replica, and bytes that it leaves."""

    weights: str
    route: str
    vision: float
    prefill: float
    decode_step: float
    kv_bytes: int
    """After the prefill, all stages together."""
    visual_bytes: int
    """Rows of an image after the projector: from an encoder to a prefill."""

    def seconds(self, load: Load) -> float:
        """That a request occupies the replica."""
        return self.vision + self.prefill + load.answer_tokens * self.decode_step / load.decode_batch


def erlang_c(servers: int, offered: float) -> float:
    """Probability that a request waits.

    Args:
        servers: at least 1.
        offered: rate times seconds of service, less than `servers`.
    """
    blocked = 1.0  # of Erlang B, by its recursion, which cannot overflow
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def mean_wait(servers: int, rate: float, seconds: float, variation: float = 0.0) -> float:
    """Mean seconds until a replica is free; infinite where there are too few.

    Args:
        variation: squared coefficient of variation of the service times; 0: all alike, 1: exponential.
    """
    offered = rate * seconds
    if offered >= servers:
        return math.inf
    return erlang_c(servers, offered) * seconds / (servers - offered) * (1 + variation) / 2


def least_servers(rate: float, seconds: float, most_wait: float) -> int:
    """The fewest replicas with which requests wait so long at most, in the mean."""
    low = math.floor(rate * seconds)  # always too few
    high = low + 1
    while mean_wait(high, rate, seconds) > most_wait:
        low, high = high, high + max(1, (high - math.floor(rate * seconds)) * 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if mean_wait(middle, rate, seconds) <= most_wait else (middle, high)
    return high


def replicas(result: dict[str, Any]) -> list[Replica]:
    """The rows of dpn_rt with batch 1 in a result of `benchmarks.latency`."""
    hidden = SHAPES[result["shape"]].hidden_size
    return [
        Replica(
            weights=row["subject"].removeprefix("dpn_rt").strip() or "bf16",
            route=row["routes"],
            vision=row["vision"]["median"],
            prefill=row["prefill"]["median"],
            decode_step=row["decode_step"]["median"],
            kv_bytes=row["kv_bytes"],
            visual_bytes=result["prompt"]["visual_rows"] * hidden * 2,
        )
        for row in result["rows"]
        if row["subject"].startswith("dpn_rt") and row["batch"] == 1
    ]


def main() -> None:
    """Prints two tables as Markdown."""
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, required=True, help="of benchmarks.latency with --json")
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 1000, 100_000], metavar="R", help="requests/s")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--image-bytes", type=int, default=200_000)
    parser.add_argument("--decode-batch", type=int, default=8)
    parser.add_argument("--wait", type=float, default=0.25, help="most seconds of waiting, in the mean")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    load = Load(options.answer_tokens, options.image_bytes, options.decode_batch)
    found = replicas(result)
    print(f"{result['shape']} on {result['machine']['cpu']}, {result['machine']['threads']} threads\n")
    heads = [f"replicas for {rate:,g}/s" for rate in options.rates]
    print("| replica | s a request | requests/s | " + " | ".join(heads) + " |")
    print("|---" * (3 + len(heads)) + "|")
    for each in found:
        seconds = each.seconds(load)
        counts = [f"{least_servers(rate, seconds, options.wait):,}" for rate in options.rates]
        print(f"| {each.weights}, {each.route} | {seconds:.2f} | {1 / seconds:.2f} | " + " | ".join(counts) + " |")
    print(
        "\n| Gbit/s between machines | a request, MB | " + " | ".join(f"{rate:,g}/s" for rate in options.rates) + " |"
    )
    print("|---" * (2 + len(heads)) + "|")
    flows = {"images from clients": load.image_bytes, "encoder to prefill": found[0].visual_bytes}
    flows |= {f"prefill to decode, {each.route}": each.kv_bytes for each in found}
    for name, size in flows.items():
        rates = [f"{rate * size * 8 / 1e9:,.3g}" for rate in options.rates]
        print(f"| {name} | {size / 1e6:.2f} | " + " | ".join(rates) + " |")


if __name__ == "__main__":
    main()
