"""Images in tiles, from a picture to tokens: dpn_rt against transformers' own model, alternating in one run.

    python -m benchmarks.anyres --model onevision-0.5b --cache DIR --json FILE

The weights are random and have the published sizes. Both get the same picture and the same number of text tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from benchmarks.measuring.machine import machine
from benchmarks.measuring.result_file import write_json
from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.cache.image_cache import ImageCache
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.outputs import RequestOutput
from dpn_rt.terminal import escape_output

NUM_TEXT_ROWS = 60
PICTURE = (1000, 1000)
"""Width and height: a square fills the largest square of tiles."""
MODELS: dict[str, dict[str, Any]] = {
    "llava-next-1b": {
        "kind": "llava_next",
        "tower": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                  "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
                  "projection_dim": 768},
        "text": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                 "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32064,
                 "max_position_embeddings": 4096},
        "image_token": 32000,
    },
    "onevision-0.5b": {
        "kind": "llava_onevision",
        "tower": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                  "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
                  "vision_use_head": False},
        "text": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                 "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 152000,
                 "max_position_embeddings": 32768, "tie_word_embeddings": True},
        "image_token": 151646,
    },
}  # fmt: skip


def make_checkpoint(path: Path, name: str) -> None:
    """A random checkpoint as transformers saves it, with the settings of its image processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    sizes = MODELS[name]
    tied = sizes["text"].get("tie_word_embeddings", False)
    config = AutoConfig.for_model(
        sizes["kind"],
        vision_config=AutoConfig.for_model(**sizes["tower"]),
        text_config=AutoConfig.for_model(**sizes["text"]),
        image_token_index=sizes["image_token"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    side = sizes["tower"]["image_size"]
    if sizes["kind"] == "llava_next":
        crop = {"height": side, "width": side}
        LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(path)
    else:
        mean = [0.5] * 3
        size = {"height": side, "width": side}
        LlavaOnevisionImageProcessorPil(size=size, image_mean=mean, image_std=mean).save_pretrained(path)


class TokenClock(BaseStreamer):
    """Notes when `generate` has each token; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept back."""


def transformers_subject(
    path: Path, picture: Image.Image, ids: Sequence[int], num_rows: int, num_tokens: int
) -> Callable[[], dict[str, float]]:
    """A function that answers with so many tokens, from the picture on, and returns its times."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16).eval()
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    token = AutoConfig.from_pretrained(path).image_token_index
    rows: list[int] = []
    for each in ids:
        rows += [token] * num_rows if each == IMAGE_PLACEHOLDER_ID else [each]
    inputs = torch.tensor([rows])

    def answer() -> dict[str, float]:
        clock, start = TokenClock(), time.perf_counter()
        images = processor(picture, return_tensors="pt")
        with torch.inference_mode():
            model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                pixel_values=images["pixel_values"].to(torch.bfloat16),
                image_sizes=images["image_sizes"],
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
                streamer=clock,
            )
        first, last = clock.times[1], clock.times[-1]
        return {"first_token": first - start, "decode_step": (last - first) / (num_tokens - 1)}

    return answer


def runtime_subject(
    llm: LLM, picture: Image.Image, ids: Sequence[int], spec: str, num_tokens: int
) -> Callable[[], dict[str, float]]:
    """The same with dpn_rt. `spec` is a reduction. It also returns the time of the prefill alone, with the image's
    rows at hand."""
    prompt = {"prompt_token_ids": list(ids), "reduce": spec}
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    prepared, kept = llm.processor.image(picture), ImageCache(2**30)

    def ask(image: Any, cache: ImageCache | None, params: SamplingParams) -> tuple[float, RequestOutput]:
        llm.engine.runner.images.cache = cache
        start = time.perf_counter()
        output = llm.generate({**prompt, "multi_modal_data": {"image": image}}, params, use_tqdm=False)[0]
        return time.perf_counter() - start, output

    ask(prepared, kept, replace(params, max_tokens=1))

    def answer() -> dict[str, float]:
        seconds, output = ask(picture, None, params)
        decoding = output.metrics.finish - output.metrics.first_token
        prefill, _ = ask(prepared, kept, replace(params, max_tokens=1))
        return {
            "first_token": seconds - decoding,
            "decode_step": decoding / (num_tokens - 1),
            "prefill": prefill,
        }

    return answer


def costs(llm: LLM, picture: Image.Image, ids: Sequence[int], spec: str) -> dict[str, Any]:
    """Rows and FLOPs of a prefill, and bytes of its KV cache."""
    llm.engine.runner.images.cache = None
    prompt = {"prompt_token_ids": list(ids), "reduce": spec, "multi_modal_data": {"image": picture}}
    pyramid = llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)[0].pyramid
    assert pyramid.flops is not None
    decoder = llm.model.decoder
    lengths = zip(pyramid.kv_lengths, llm.model.stage_layers, strict=True)
    cells = sum(length * len(layers) for length, layers in lengths)
    return {
        "visual_tokens": pyramid.visual_tokens,
        "flops": pyramid.flops.prefill,
        "kv_bytes": cells * 2 * decoder.num_kv_heads * decoder.head_dim * 2,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median with the extremes."""
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def main() -> None:
    """Command line."""
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="onevision-0.5b")
    parser.add_argument("--cache", type=Path, required=True, help="directory that keeps checkpoint and engine")
    parser.add_argument("--reduce", nargs="*", default=["none"], metavar="SPEC", help="none first")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checkpoint, engine = options.cache / options.model, options.cache / f"{options.model}-engine"
    if not (checkpoint / "config.json").exists():
        make_checkpoint(checkpoint, options.model)
    if not (engine / "engine.json").exists():
        build_engine(checkpoint, engine, dtype="bfloat16")
    picture = Image.effect_mandelbrot(PICTURE, (-2.0, -1.5, 1.0, 1.5), 100).convert("RGB")
    ids = [1, IMAGE_PLACEHOLDER_ID, *range(5, 4 + NUM_TEXT_ROWS)]
    llm = LLM(engine, reduce=options.reduce)
    image = llm.processor.image(picture)
    subjects = {f"dpn_rt {spec}": runtime_subject(llm, picture, ids, spec, options.tokens) for spec in options.reduce}
    if not options.without_transformers:
        subjects["transformers"] = transformers_subject(checkpoint, picture, ids, image.num_rows, options.tokens)
    for answer in subjects.values():
        answer()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    for number in range(options.rounds):
        for name in list(subjects) if number % 2 else reversed(subjects):
            found[name].append(subjects[name]())
    result = {
        "model": options.model,
        "machine": machine("cpu"),
        "crops": len(image.views),
        "visual_tokens": image.num_visual_tokens,
        "rows": image.num_rows + NUM_TEXT_ROWS,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "subjects": {
            name: {key: spread([each[key] for each in rounds]) for key in rounds[0]} for name, rounds in found.items()
        },
        "costs": {f"dpn_rt {spec}": costs(llm, picture, ids, spec) for spec in options.reduce},
        "ratios": ratios(found),
    }
    dense = result["costs"]["dpn_rt none"]
    for name, cost in result["costs"].items():
        if name != "dpn_rt none":
            gains = [value * cost["flops"] / dense["flops"] for value in result["ratios"][name]["prefill"]["samples"]]
            cost["realised"] = spread(gains)
    print(json.dumps({key: result[key] for key in ("subjects", "costs")}, indent=1))
    for name, ratio in result["ratios"].items():
        print(name, {key: round(each["median"], 2) for key, each in ratio.items()})
    if options.json is not None:
        write_json(options.json, result)


def ratios(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Times faster, paired by round: dpn_rt than transformers, and each reduction than none."""
    pairs = {name: "dpn_rt none" for name in found if name.startswith("dpn_rt") and name != "dpn_rt none"}
    if "transformers" in found:
        pairs["dpn_rt none"] = "transformers"
    result: dict[str, dict[str, Any]] = {}
    for name, other in pairs.items():
        result[name] = {}
        for key in found[name][0].keys() & found[other][0].keys():
            samples = [slow[key] / fast[key] for fast, slow in zip(found[name], found[other], strict=True)]
            result[name][key] = {**spread(samples), "samples": samples}
    return result


if __name__ == "__main__":
    main()
