"""Memory over many requests that are all new: images of random sizes, texts and answers of random lengths.

python -m benchmarks.growth --engine DIR --clients 32 --requests 10000 --json benchmarks/results/growth-tiny.json

Starts a server and prints the resident memory of its two processes while it answers. The growth is that of their sum
over the second half of the requests after the first `--warm` ones: mean of its last tenth over mean of its first.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.load.http_questions import data_url
from benchmarks.load.server_process import serving
from benchmarks.measuring.machine import machine
from benchmarks.measuring.result_file import write_json
from dpn_rt.terminal import escape_output

SAMPLE_EVERY = 100
"""Requests between two samples of memory."""
WORDS = [
    "what",
    "color",
    "shape",
    "is",
    "the",
    "circle",
    "square",
    "left",
    "of",
    "star",
    "background",
    "how",
    "many",
    "big",
    "small",
    "are",
    "there",
]


@dataclass
class Growth:
    """What was seen."""

    requests: int
    clients: int
    warm: int
    seconds: float = 0.0
    statuses: dict[int, int] = field(default_factory=dict)
    server_mb: list[int] = field(default_factory=list)
    """Resident memory of the server's process, every `SAMPLE_EVERY` requests."""
    engine_mb: list[int] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Of the sum, over the second half of the requests after the warm ones."""
        total = np.add(self.server_mb, self.engine_mb)[self.warm // SAMPLE_EVERY :]
        half = total[len(total) // 2 :]
        tenth = max(1, len(half) // 10)
        return float(half[-tenth:].mean() / half[:tenth].mean() - 1)


def random_body(draw: np.random.Generator, model: str) -> dict[str, Any]:
    """A chat request with an image that no other request has."""
    width, height = (int(size) for size in draw.integers(16, 700, 2))
    coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BILINEAR).save(file, "PNG", compress_level=1)
    text = " ".join(draw.choice(WORDS, int(draw.integers(1, 60))))
    content = [{"type": "image_url", "image_url": {"url": data_url(file.getvalue())}}, {"type": "text", "text": text}]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": int(draw.integers(1, 40)),
        "ignore_eos": bool(draw.integers(2)),
        "stream": bool(draw.integers(2)),
    }


async def load(url: str, pid: int, model: str, result: Growth, seed: int) -> None:
    """Sends the requests and samples memory."""
    draw, server = np.random.default_rng(seed), psutil.Process(pid)
    (engine,) = server.children()
    numbers, done = iter(range(result.requests)), 0

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal done
        for _ in numbers:
            reply = await client.post("/v1/chat/completions", json=random_body(draw, model))
            result.statuses[reply.status_code] = result.statuses.get(reply.status_code, 0) + 1
            done += 1
            if done % SAMPLE_EVERY == 0:
                result.server_mb.append(server.memory_info().rss >> 20)
                result.engine_mb.append(engine.memory_info().rss >> 20)
                print(
                    f"{done:6d} requests: server {result.server_mb[-1]} MB, engine {result.engine_mb[-1]} MB",
                    flush=True,
                )

    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await asyncio.gather(*(work(client) for _ in range(result.clients)))
    result.seconds = time.perf_counter() - started


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--warm", type=int, default=2_000, help="requests before growth counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("options", nargs="*", help="of the server, after --")
    options = parser.parse_args()
    result = Growth(options.requests, options.clients, options.warm)
    with serving(options.engine, *options.options) as (url, pid):
        asyncio.run(load(url, pid, options.engine.resolve().name, result, options.seed))
    summary = {"machine": machine("cpu"), **asdict(result), "growth": result.growth}
    print(f"growth of the sum over the second half: {100 * result.growth:.2f} %, statuses {result.statuses}")
    if options.json:
        write_json(options.json, summary)
    return 0 if set(result.statuses) == {200} and result.growth < 0.03 else 1


if __name__ == "__main__":
    sys.exit(main())
