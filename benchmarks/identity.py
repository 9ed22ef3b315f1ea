"""Never a wrong image: one question about many images of one size, or two of them, however requests meet each other.

python -m benchmarks.identity --engine DIR --clients 32 --requests 5000

Starts a server with caches that hold a few images and a KV cache that makes sequences preempt each other. Requests
stream or not, force routes or not, and some clients leave. Each answer must be the one that `LLM`, without any cache,
gives to these images: the same text and route, and the routers' probabilities within 1e-3. The engine should be in
float32. Fails (exit status 1) if an answer is another one.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.http_questions import data_url
from benchmarks.soak import serving
from dpn_rt import LLM, SamplingParams
from dpn_rt.terminal import escape_output
from examples.tiny_dpn import data

QUESTION = "What color is the background?"
TOLERANCE = 1e-3
TIGHT = ("--max-num-seqs", "8", "--max-chunk-tokens", "64", "--reuse-bytes", "2000000", "--kv-cache-bytes", "8000000")
"""Options of a server that must forget and preempt."""


@dataclass(frozen=True, eq=False)
class Case:
    """A request, and what it must be answered with."""

    body: dict[str, Any]
    text: str
    experts: list[int | None]
    probs: list[list[float] | None]
    """Per boundary; None where no router was asked."""


@dataclass
class Outcome:
    """What came of all requests."""

    right: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


def images() -> list[tuple[str, bytes]]:
    """Names and files of pictures of one size: scenes, copies with one other pixel, other encodings, solid colours."""
    found = []
    for number in range(3):
        scene = data.sample("test", number).image.convert("RGB")
        found.append((f"scene {number}", _file(scene, "PNG")))
        for x in (0, scene.width // 2):
            other = scene.copy()
            red, green, blue = other.getpixel((x, 5))
            other.putpixel((x, 5), (255 - red, 255 - green, 255 - blue))
            found.append((f"scene {number}, pixel {x}", _file(other, "PNG")))
        found.append((f"scene {number}, BMP", _file(scene, "BMP")))
        found.append((f"scene {number}, JPEG", _file(scene, "JPEG")))
    size = data.sample("test", 0).image.size
    for colour in ((0, 0, 0), (255, 255, 255), (255, 0, 0), (254, 0, 0), (0, 255, 0), (0, 0, 255)):
        found.append((f"solid {colour}", _file(Image.new("RGB", size, colour), "PNG")))
    return found


def asked() -> list[tuple[bytes, ...]]:
    """The images of each prompt: every one alone, and neighbours in both orders."""
    files = [file for _, file in images()]
    pairs = list(pairwise(files))[::3]
    return [*((file,) for file in files), *pairs, *((other, one) for one, other in pairs)]


def _file(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def cases(llm: LLM, model: str, variants: Sequence[dict[str, Any]], per_image: int, max_tokens: int = 64) -> list[Case]:
    """Images, one or two in a prompt, with variants (fields of a prompt such as `route`), and their answers alone.

    Args:
        per_image: how many of the variants each image has, the next image the next ones.
    """
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    found = []
    turns = cycle(variants)
    for files in asked():
        question = {"type": "text", "text": QUESTION}
        pictures = [{"type": "image", "image": Image.open(io.BytesIO(file))} for file in files]
        prompt = llm.processor.chat([{"role": "user", "content": [*pictures, question]}])
        parts = [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files]
        messages = [{"role": "user", "content": [*parts, question]}]
        for variant in islice(turns, per_image):
            output = llm.generate({**prompt, **variant}, params, use_tqdm=False)[0]
            fields = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **variant}
            body = {"model": model, "messages": messages, **fields}
            probs = [None if each is None else [float(p) for p in each] for each in output.pyramid.probs or ()]
            found.append(Case(body, output.outputs[0].text, list(output.pyramid.experts), probs))
    return found


def ask_all(url: str, given: Sequence[Case], clients: int, requests: int, seed: int) -> Outcome:
    """Sends `requests` of the cases, drawn at random."""
    draw, outcome = random.Random(seed), Outcome()
    jobs = [(draw.choice(given), draw.random() < 0.5, draw.random() < 0.1) for _ in range(requests)]

    with httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        def work(job: tuple[Case, bool, bool]) -> None:
            case, stream, leaves = job
            if leaves:
                with client.stream("POST", "/v1/chat/completions", json={**case.body, "stream": True}) as reply:
                    next(reply.iter_lines(), None)
                outcome.left += 1
                return
            reply = client.post("/v1/chat/completions", json={**case.body, "stream": stream})
            outcome.statuses[reply.status_code] += 1
            fault = _fault(reply, case, stream)
            if fault is None:
                outcome.right += 1
            else:
                outcome.wrong.append(fault)

        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(work, jobs))
    return outcome


def _fault(reply: httpx.Response, case: Case, stream: bool) -> str | None:
    """What is wrong with a reply; None if nothing is."""
    if reply.status_code != 200:
        return f"{reply.status_code} {reply.text[:200]}"
    if stream:
        chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        pyramid = next(chunk["pyramid"] for chunk in reversed(chunks) if "pyramid" in chunk)
    else:
        text, pyramid = reply.json()["choices"][0]["message"]["content"], reply.json()["pyramid"]
    if text != case.text or pyramid["experts"] != case.experts:
        return f"{text!r} by {pyramid['experts']}, expected {case.text!r} by {case.experts}"
    for seen, expected in zip(pyramid["probs"] or (), case.probs, strict=True):
        if (seen is None) != (expected is None) or (seen and np.abs(np.subtract(seen, expected)).max() > TOLERANCE):
            return f"probabilities {seen}, expected {expected}"
    return None


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    llm = LLM(options.engine)
    boundaries = len(llm.model.reduction.layers)
    variants = [{}, {"route": [0] * boundaries}, {"route": [1] * boundaries}, {"router_bias": 4.0}]
    given = cases(llm, options.engine.resolve().name, variants, per_image=len(variants))
    with serving(options.engine, *TIGHT) as (url, _):
        outcome = ask_all(url, given, options.clients, options.requests, options.seed)
        metrics = httpx.get(f"{url}/metrics").text
    preemptions = next(line for line in metrics.splitlines() if line.startswith("dpn_rt:num_preemptions_total"))
    print(json.dumps({**vars(outcome), "wrong": outcome.wrong[:10], "preemptions": preemptions.split()[-1]}, indent=1))
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
