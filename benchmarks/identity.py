"""Never a wrong image: one question about many images of one size, or two of them, however requests meet each other.

python -m benchmarks.identity --engine DIR --clients 32 --requests 5000
python -m benchmarks.identity --tiled DIR --reduce none fastv:k=2,ratio=0.5 --clients 32 --requests 1000

`--tiled` is the place of a small random engine of `--family` that takes images in tiles; it is built if it is missing.

Starts a server with caches that hold a few images and a KV cache that makes sequences preempt each other. Requests
stream or not, force routes or reductions or not, and some clients leave. Each answer must be the one that `LLM` gives
to these images without any cache: the same text, route and kept rows, and the routers' probabilities within 1e-3. The
engine should be in float32. Fails (exit status 1) if an answer is another one.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
from PIL import Image

from benchmarks.load.http_questions import data_url
from benchmarks.load.server_process import serving
from benchmarks.models.tiled_checkpoint import Family, write_tiled_checkpoint
from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.terminal import escape_output
from examples.tiny_dpn import data

SAME = ("experts", "visual_tokens", "kv_lengths", "kept")
"""Of a pyramid: what must not differ."""
TILED_SCALE = 2
"""Of scenes for the small engine with tiles: four tiles, and more than `TIGHT` caches hold."""
QUESTION = "What color is the background?"
TOLERANCE = 1e-3
TIGHT = ("--max-num-seqs", "8", "--max-chunk-tokens", "64", "--reuse-bytes", "2000000")
"""Options of a server that must forget."""
KV_CACHE_BYTES = 8_000_000
"""So few that sequences preempt each other."""
TILED_KV_CACHE_BYTES = 1_500_000


@dataclass(frozen=True, eq=False)
class Case:
    """A request."""

    name: str
    body: dict[str, Any]
    prompt: dict[str, Any]
    """The same, as `LLM.generate` takes it."""
    has_ties: bool
    """Tiles of one colour repeat the rows of the overview. Which of equal rows DivPrune keeps is the last bit's choice;
    only the answer is compared."""


@dataclass(frozen=True)
class Answer:
    """What a request must be answered with."""

    text: str
    pyramid: dict[str, Any]
    """As the server writes it."""


@dataclass
class Outcome:
    """What came of all requests."""

    right: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


def images(scale: int = 1) -> list[tuple[str, bytes]]:
    """Names and files of pictures of one size: scenes, copies with one other pixel, other encodings, solid colours.

    Args:
        scale: times the size of a scene.
    """
    found = []
    for number in range(3):
        scene = data.sample("test", number).image.convert("RGB")
        scene = scene.resize((scene.width * scale, scene.height * scale), Image.Resampling.NEAREST)
        found.append((f"scene {number}", _file(scene, "PNG")))
        for x in (0, scene.width // 2):
            other = scene.copy()
            red, green, blue = other.getpixel((x, 5))
            other.putpixel((x, 5), (255 - red, 255 - green, 255 - blue))
            found.append((f"scene {number}, pixel {x}", _file(other, "PNG")))
        found.append((f"scene {number}, BMP", _file(scene, "BMP")))
        found.append((f"scene {number}, JPEG", _file(scene, "JPEG")))
    for colour in ((0, 0, 0), (255, 255, 255), (255, 0, 0), (254, 0, 0), (0, 255, 0), (0, 0, 255)):
        found.append((f"solid {colour}", _file(Image.new("RGB", scene.size, colour), "PNG")))
    return found


def asked(scale: int = 1) -> list[tuple[tuple[str, bytes], ...]]:
    """The images of each prompt: every one alone, and neighbours in both orders."""
    found = images(scale)
    pairs = list(pairwise(found))[::3]
    return [*((image,) for image in found), *pairs, *((other, one) for one, other in pairs)]


def _file(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def cases(
    llm: LLM, model: str, variants: Sequence[dict[str, Any]], per_image: int, max_tokens: int = 64, scale: int = 1
) -> list[Case]:
    """Images, one or two in a prompt, with variants (fields of a prompt such as `route`).

    Args:
        per_image: how many of the variants each image has, the next image the next ones.
        scale: see `images`.
    """
    found = []
    turns = cycle(variants)
    for shown in asked(scale):
        names, files = zip(*shown, strict=True)
        question = {"type": "text", "text": QUESTION}
        pictures = [{"type": "image", "image": Image.open(io.BytesIO(file))} for file in files]
        prompt = llm.processor.chat([{"role": "user", "content": [*pictures, question]}])
        parts = [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files]
        messages = [{"role": "user", "content": [*parts, question]}]
        for variant in islice(turns, per_image):
            has_ties = "solid" in " ".join(names) and "divprune" in variant.get("reduce", "")
            fields = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **variant}
            body = {"model": model, "messages": messages, **fields}
            name = f"{' and '.join(names)} {variant}"
            found.append(Case(name, body, {**prompt, **variant}, has_ties))
    return found


def answer_alone(llm: LLM, case: Case) -> Answer:
    """What a case is answered with when nothing else is asked."""
    params = SamplingParams(temperature=0, max_tokens=case.body["max_tokens"], ignore_eos=True)
    output = llm.generate(case.prompt, params, use_tqdm=False)[0]
    return Answer(output.outputs[0].text, output.to_dict()["pyramid"])


def ask_all(url: str, llm: LLM, given: Sequence[Case], clients: int, requests: int, seed: int) -> Outcome:
    """Sends `requests` of the cases, drawn at random, and compares each reply with the answer of `llm`."""
    draw, outcome = random.Random(seed), Outcome()
    jobs = [(draw.choice(given), draw.random() < 0.5, draw.random() < 0.1) for _ in range(requests)]
    compared = dict.fromkeys(case for case, _, leaves in jobs if not leaves)
    answers = {case: answer_alone(llm, case) for case in compared}

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
            fault = fault_of(reply, case, answers[case], stream)
            if fault is None:
                outcome.right += 1
            else:
                outcome.wrong.append(f"{case.name}: {fault}")

        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(work, jobs))
    return outcome


def fault_of(reply: httpx.Response, case: Case, answer: Answer, stream: bool) -> str | None:
    """What is wrong with a reply; None if nothing is."""
    if reply.status_code != 200:
        return f"{reply.status_code} {reply.text[:200]}"
    if stream:
        chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        pyramid = next(chunk["pyramid"] for chunk in reversed(chunks) if "pyramid" in chunk)
    else:
        text, pyramid = reply.json()["choices"][0]["message"]["content"], reply.json()["pyramid"]
    keys = [key for key in SAME if key != "kept" or not case.has_ties]
    found = {"text": text, **{key: pyramid[key] for key in keys}}
    wanted = {"text": answer.text, **{key: answer.pyramid[key] for key in keys}}
    if found != wanted:
        key = next(key for key in wanted if found[key] != wanted[key])
        return f"{key} {found[key]!r}, expected {wanted[key]!r}"
    for seen, expected in zip(pyramid["probs"] or (), answer.pyramid["probs"] or (), strict=True):
        if (seen is None) != (expected is None) or (seen and np.abs(np.subtract(seen, expected)).max() > TOLERANCE):
            return f"probabilities {seen}, expected {expected}"
    return None


def engine_of(options: argparse.Namespace) -> Path:
    """The engine that is asked, built first where it may be."""
    if options.engine is not None:
        return Path(options.engine)
    engine = Path(options.tiled)
    if not (engine / "engine.json").exists():
        with tempfile.TemporaryDirectory() as folder:
            write_tiled_checkpoint(Path(folder), options.family)
            build_engine(folder, engine, dtype="float32")
    return engine


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--engine", type=Path)
    which.add_argument("--tiled", type=Path, metavar="DIR")
    parser.add_argument("--family", choices=get_args(Family), default="next", help="of the engine with tiles")
    parser.add_argument("--reduce", nargs="+", default=[], metavar="SPEC", help="of a dense model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    engine = engine_of(options)
    llm = LLM(engine, reduce=options.reduce or None)
    boundaries = len(llm.model.reduction.layers)
    variants: list[dict[str, Any]] = [{"reduce": spec} for spec in options.reduce]
    if boundaries and not variants:
        variants = [{}, {"route": [0] * boundaries}, {"route": [1] * boundaries}, {"router_bias": 4.0}]
    scale = TILED_SCALE if options.tiled else 1
    given = cases(llm, engine.resolve().name, variants or [{}], per_image=len(variants or [{}]), scale=scale)
    reductions = ["--reduce", *options.reduce] if options.reduce else []
    kv_cache_bytes = str(TILED_KV_CACHE_BYTES if options.tiled else KV_CACHE_BYTES)
    with serving(engine, *TIGHT, "--kv-cache-bytes", kv_cache_bytes, *reductions) as (url, _):
        outcome = ask_all(url, llm, given, options.clients, options.requests, options.seed)
        metrics = httpx.get(f"{url}/metrics").text
    preemptions = next(line for line in metrics.splitlines() if line.startswith("dpn_rt:num_preemptions_total"))
    print(json.dumps({**vars(outcome), "wrong": outcome.wrong[:10], "preemptions": preemptions.split()[-1]}, indent=1))
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
