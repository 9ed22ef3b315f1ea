"""Throughput over HTTP with training-free reductions, against the same server without, and against what FLOPs allow.

python -m benchmarks.serve_reduced --shape llava-1b --reduce fastv:k=2,ratio=0.5 --clients 1 8 32 --json FILE

Weights are random. Every request has a picture of its own, and nothing is reused. A round runs all reductions with all
numbers of clients, in turn. FLOPs are those of tower, prefill and decoding; "bound" is their ratio to the dense ones.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.comparison.measure import reduced_stages
from benchmarks.load.http_questions import Question
from benchmarks.load.loops import Round, closed_loop, summarize
from benchmarks.load.server_process import serving
from benchmarks.measuring.machine import machine
from benchmarks.measuring.result_file import write_json
from benchmarks.models.shapes import SHAPES, random_weights
from dpn_rt import LLM
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineSource, write_engine
from dpn_rt.format.flops import layer_weights, prefill_flops, vision_flops
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.terminal import escape_output

CHECKPOINT = Path(__file__).resolve().parent.parent / "examples" / "tiny_dpn" / "dense_checkpoint"
"""Its tokenizer is used, whose ids every shape has."""
QUESTION = "What color is the background, and how many squares are on it?"
DENSE = "none"


def write_served_engine(path: Path, shape: str) -> ModelConfig:
    """A stock engine of a shape with random weights that takes chats with pictures."""
    model = SHAPES[shape].model("bfloat16")
    prompt = dataclasses.replace(model.prompt, router_token_id=None, has_tokenizer=True, has_image_processor=True)
    model = dataclasses.replace(model, reduction=NoReduction(), prompt=prompt)
    assert model.vision is not None
    size = {"height": model.vision.image_size, "width": model.vision.image_size}
    pictures = json.loads((CHECKPOINT / "preprocessor_config.json").read_text())
    pictures |= {"size": {"shortest_edge": model.vision.image_size}, "crop_size": size}
    files: dict[str, Path | bytes] = {
        "tokenizer.json": CHECKPOINT / "tokenizer.json",
        "special_tokens_map.json": b"{}",
        "preprocessor_config.json": json.dumps(pictures).encode(),
    }
    if not (path / "engine.json").exists():
        write_engine(path, model, EngineSource("0" * 64, "synthetic"), random_weights(model), files)
    return model


def questions(count: int, max_tokens: int) -> list[Question]:
    """Each with a picture of its own."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (count, 14, 14, 3), dtype=np.uint8)
    images = [Image.fromarray(each).resize((336, 336)) for each in pixels]
    return [Question(image, QUESTION, max_tokens) for image in images]


def request_flops(model: ModelConfig, spec: str, num_text: int, max_tokens: int) -> dict[str, int]:
    """FLOPs of one request's tower, prefill, and decoding."""
    shaped, rows = reduced_stages(model, spec, num_text)
    decoder = model.decoder
    per_token = 2 * (decoder.num_layers * layer_weights(decoder) + decoder.vocab_size * decoder.hidden_size)
    return {
        "vision": vision_flops(model),
        "prefill": prefill_flops(shaped, rows),
        "decode": (max_tokens - 1) * per_token,
    }


def measure(options: argparse.Namespace, engine: Path) -> dict[str, Any]:
    """Run all loads, round by round."""
    model, specs = write_served_engine(engine, options.shape), [DENSE, *options.reduce]
    num_text, tower = _offline(engine, options.max_tokens)
    loads: dict[tuple[str, int], list[Round]] = {}
    with serving(engine, "--reduce", *specs, "--reuse-bytes", "0") as (url, _):
        for number in range(-1, options.rounds):  # the first round warms up
            for spec in specs if number % 2 else specs[::-1]:
                for clients in options.clients:
                    count = max(2, 2 * clients) if number >= 0 else 1
                    bodies = [
                        one.body(engine.name, stream=True, ignore_eos=True, reduce=spec)
                        for one in questions(count, options.max_tokens)
                    ]
                    seen = asyncio.run(closed_loop(url, bodies, clients))
                    if number >= 0:
                        loads.setdefault((spec, clients), []).append(seen)
    dense = request_flops(model, DENSE, num_text, options.max_tokens)
    results = []
    for (spec, clients), rounds in loads.items():
        flops = request_flops(model, spec, num_text, options.max_tokens)
        ratios = [
            base.seconds / len(base.timings) / (one.seconds / len(one.timings))
            for one, base in zip(rounds, loads[DENSE, clients], strict=True)
        ]
        results.append(
            {
                "reduce": spec,
                "clients": clients,
                **summarize(rounds, 0.5, 0.1),
                "flops": flops,
                "speed_to_dense": {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)},
                "bound": sum(dense.values()) / sum(flops.values()),
            }
        )
    return {
        "shape": options.shape,
        "machine": machine("cpu"),
        "rounds": options.rounds,
        "max_tokens": options.max_tokens,
        "text_rows": num_text,
        "tower_seconds": tower,
        "loads": sorted(results, key=lambda load: (load["clients"], specs.index(load["reduce"]))),
    }


def _offline(engine: Path, max_tokens: int) -> tuple[int, float]:
    """Text rows of a question, and the seconds that the tower takes for its picture (the fastest of three)."""
    llm = LLM(engine, reuse_bytes=0)
    seconds = []
    for question in questions(3, max_tokens):
        prompt = llm.processor.process(llm.processor.chat(question.messages()))
        started = time.perf_counter()
        llm.engine.runner.images.encode(list(prompt.images))
        seconds.append(time.perf_counter() - started)
    return prompt.num_text_rows, min(seconds)


def report(result: dict[str, Any]) -> str:
    """The result as a Markdown table; "tower" is its share of the time, were it alone on the machine."""
    lines = [
        "| clients | reduction | requests/s | TTFT ms median | speed / dense | bound | realised | tower |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for load in result["loads"]:
        rate, speed = load["requests_per_second"], load["speed_to_dense"]
        lines.append(
            f"| {load['clients']} | `{load['reduce']}` | {rate['median']:.3f} ({rate['min']:.3f} - {rate['max']:.3f}) "
            f"| {load['ttft_ms']['median']:.0f} | {speed['median']:.2f} | {load['bound']:.2f} "
            f"| {speed['median'] / load['bound']:.2f} | {100 * rate['median'] * result['tower_seconds']:.0f} % |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llava-1b")
    parser.add_argument("--reduce", nargs="+", default=["fastv:k=2,ratio=0.5"], metavar="SPEC")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=4)
    parser.add_argument("--cache", type=Path, help="keep the engine here for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="dpn_rt-benchmark-") as directory:
        result = measure(options, (options.cache or Path(directory)) / f"{options.shape}-served")
    print(report(result))
    if options.json:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
