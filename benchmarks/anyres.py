"""Images in tiles, from a picture to tokens: dpn_rt against transformers' own model, alternating in one run.

    python -m benchmarks.anyres --model onevision-0.5b --cache DIR --json FILE

The weights are random and have the published sizes. Both get the same picture and the same number of text tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import cpu_name
from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
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


def transformers_subject(path: Path, picture: Image.Image, ids: Sequence[int], num_rows: int) -> Callable[[int], Any]:
    """A function that answers with so many tokens, from the picture on."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16).eval()
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    token = AutoConfig.from_pretrained(path).image_token_index
    rows: list[int] = []
    for each in ids:
        rows += [token] * num_rows if each == IMAGE_PLACEHOLDER_ID else [each]
    inputs = torch.tensor([rows])

    def answer(num_tokens: int) -> Any:
        images = processor(picture, return_tensors="pt")
        with torch.inference_mode():
            return model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                pixel_values=images["pixel_values"].to(torch.bfloat16),
                image_sizes=images["image_sizes"],
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
            )

    return answer


def runtime_subject(llm: LLM, picture: Image.Image, ids: Sequence[int], spec: str) -> Callable[[int], Any]:
    """The same with dpn_rt; `spec` is a reduction."""
    prompt = {"prompt_token_ids": list(ids), "multi_modal_data": {"image": picture}, "reduce": spec}

    def answer(num_tokens: int) -> Any:
        llm.engine.runner.images.cache = None  # the picture counts as new each time
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        return llm.generate(prompt, params, use_tqdm=False)[0]

    return answer


def measure(answer: Callable[[int], Any], num_tokens: int) -> dict[str, float]:
    """Seconds from picture to first token, and per further token."""
    start = time.perf_counter()
    answer(1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    answer(num_tokens)
    return {"first_token": first, "decode_step": (time.perf_counter() - start - first) / (num_tokens - 1)}


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
    subjects = {
        "dpn_rt" if spec == "none" else f"dpn_rt {spec}": runtime_subject(llm, picture, ids, spec)
        for spec in options.reduce
    }
    if not options.without_transformers:
        subjects["transformers"] = transformers_subject(checkpoint, picture, ids, image.num_rows)
    for answer in subjects.values():
        answer(2)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    for number in range(options.rounds):
        order = list(subjects) if number % 2 else list(subjects)[::-1]
        for name in order:
            found[name].append(measure(subjects[name], options.tokens))
    result = {
        "model": options.model,
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "crops": len(image.views),
        "visual_tokens": image.num_visual_tokens,
        "rows": image.num_rows + NUM_TEXT_ROWS,
        "subjects": {
            name: {
                key: {
                    "median": float(np.median([each[key] for each in rounds])),
                    "least": min(each[key] for each in rounds),
                    "most": max(each[key] for each in rounds),
                }
                for key in rounds[0]
            }
            for name, rounds in found.items()
        },
        "flops": {
            spec: answer(1).pyramid.flops.prefill
            for spec, answer in zip(options.reduce, subjects.values(), strict=False)
        },
    }
    for name, times in result["subjects"].items():
        first, step = (times[key]["median"] for key in ("first_token", "decode_step"))
        print(f"{name:40} first token {first:.3f} s, step {1e3 * step:.1f} ms")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
