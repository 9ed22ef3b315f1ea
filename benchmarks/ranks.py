"""What an engine costs on one rank and on several: memory of each process, vision encoder, prefill, decode steps.

python -m benchmarks.ranks --shape llava-1b --sizes 1 2 --result benchmarks/results/llava-1b-cpu-ranks-shared.json

Each number of ranks runs in a process of its own, with all of the processor. One prompt at a time: 64 ids of text and
an image. Images are encoded by themselves; prefills begin with rows of images that are given.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.measure import engine_directory
from benchmarks.measuring.memory import resident_bytes
from benchmarks.measuring.result_file import write_json
from benchmarks.models.shapes import SHAPES, prompt_token_ids
from dpn_rt import LLM, SamplingParams
from dpn_rt.backends.parallel.parallel_executor import ParallelExecutor
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.schema.weights import TORCH_DTYPES
from dpn_rt.terminal import escape_output

KV_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Measured:
    """One number of ranks."""

    size: int
    threads: int
    """Of each rank."""
    resident_mb: list[int]
    """Of each process, once it has answered; mapped files included."""
    private_mb: list[int]
    """Of these, without mapped files."""
    encode_s: list[float]
    """Of an image."""
    prefill_s: list[float]
    decode_s: list[float]
    """Of a step, mean of each answer."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    escape_output()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llava-1b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--answers", type=int, default=3, metavar="N", help="measured, after one that is not")
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="of an answer")
    parser.add_argument("--engines", type=Path, metavar="DIR", help="where engines are kept")
    parser.add_argument("--result", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    model = SHAPES[options.shape].model(options.dtype)
    results = []
    with engine_directory(model, options.engines, f"{options.shape}-{options.dtype}") as path:
        for size in options.sizes:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                results.append(process.submit(measure, path, size, options.answers, options.max_tokens).result())
            show(results[-1])
    if options.result is not None:
        facts = {"shape": options.shape, "dtype": options.dtype, "torch": torch.__version__}
        write_json(options.result, facts | {"ranks": [dataclasses.asdict(each) for each in results]})


def measure(path: Path, size: int, num_answers: int, max_tokens: int) -> Measured:
    """An engine on `size` ranks, in this process and those that it starts."""
    llm = LLM(path, tensor_parallel_size=size, kv_cache_bytes=KV_BYTES // size, prepack_weights=False, verify=False)
    llm.generate(with_image(llm.model), SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    encode = [encode_seconds(llm) for _ in range(num_answers)]
    prompt = request(llm.model)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    prefill, decode = [], []
    for _ in range(1 + num_answers):
        started = time.perf_counter()
        deltas = [time.perf_counter() for _ in llm.stream(prompt, params)]
        prefill.append(deltas[0] - started)
        decode.append((deltas[-1] - deltas[0]) / (len(deltas) - 1))
    processes = [os.getpid()]
    executor = llm.engine.runner.backend.executor  # type: ignore[attr-defined]
    if isinstance(executor, ParallelExecutor):
        processes += executor.process_ids
    result = Measured(
        size,
        torch.get_num_threads(),
        [megabytes("VmRSS", process) for process in processes],
        [megabytes("RssAnon", process) for process in processes],
        encode,
        prefill[1:],
        decode[1:],
    )
    llm.close()
    return result


def encode_seconds(llm: LLM) -> float:
    """Of one image through the vision encoder, which has run before."""
    encoder = llm.engine.runner.images.encoder
    assert encoder is not None
    started = time.perf_counter()
    with torch.inference_mode():
        encoder.encode([black_image(llm.model)])
    return time.perf_counter() - started


def request(model: ModelConfig) -> dict[str, Any]:
    """Text and one image of zeros, on the route of the most reduction."""
    assert model.vision is not None
    shape = model.vision.num_visual_tokens, model.decoder.hidden_size
    image = {"image_embeds": torch.zeros(shape, dtype=TORCH_DTYPES[model.dtype])}
    return {"prompt_token_ids": prompt_token_ids(model), "multi_modal_data": image, "route": [2, 2, 2]}


def with_image(model: ModelConfig) -> dict[str, Any]:
    """Text and a black image."""
    return {"prompt_token_ids": prompt_token_ids(model), "multi_modal_data": {"image": black_image(model)}}


def black_image(model: ModelConfig) -> VisualInput:
    """For the model's encoder."""
    assert isinstance(model.vision, ClipConfig)
    views = tuple(torch.zeros(shape) for shape in model.vision.view_shapes)
    return VisualInput.of_views(views, model.vision.grid, model.vision.num_visual_tokens)


def megabytes(key: str, process: int) -> int:
    """Of a line of /proc/PROCESS/status."""
    num_bytes = resident_bytes(key, process)
    assert num_bytes is not None, "Linux reports the memory of processes"
    return num_bytes >> 20


def show(result: Measured) -> None:
    """One line."""
    encode, prefill, decode = map(statistics.median, (result.encode_s, result.prefill_s, result.decode_s))
    print(
        f"{result.size} ranks of {result.threads} threads: resident {result.resident_mb} MB, private "
        f"{result.private_mb} MB, an image {encode:.3f} s, prefill {prefill:.3f} s, a step {1000 * decode:.1f} ms"
    )


if __name__ == "__main__":
    main()
