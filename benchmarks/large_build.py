"""Builds an engine from a checkpoint of a published size and reports the memory that it took.

    python benchmarks/large_build.py --shape llava-hr-x-13b --directory /tmp/large

The checkpoint is written first: a megabyte of random numbers at the start of each weight, and a hole in the file after
it, which reads as zeros. It takes little space; the engine takes all of its own (28 GB for 13B in bfloat16). Both are
removed at the end. Memory without mapped files is RssAnon of /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

if not __package__:  # run as a file: `benchmarks` is found in the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring.memory import resident_bytes
from benchmarks.models.shapes import ROUTER_TOKEN, SHAPES, WEIGHT_STD
from dpn_rt.builders.hr_tower import CLIP_L, PREFIX, hr_forms
from dpn_rt.builders.names import hr_modules, original_names, published_modules, weight_names
from dpn_rt.builders.native import build_engine
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.weight_spec import canonical_specs
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.model.vision.hr.config import HrConfig
from dpn_rt.terminal import escape_output

SHARD_BYTES = 5 << 30
RANDOM_VALUES = 1 << 19
"""At the start of each weight; 2 bytes each."""
SAMPLE_SECONDS = 0.02


def published_shapes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of a LLaVA-HR checkpoint."""
    vision = model.vision
    assert isinstance(vision, HrConfig)
    native = type(vision.fast)(**{**vars(vision.fast), "image_size": CLIP_L["image_size"]})
    forms, specs = hr_forms(vision, native), canonical_specs(model)
    modules = published_modules(model, original_names("mlp2x_gelu"), hr_modules(vision, PREFIX))
    for canonical, names in weight_names(specs, modules).items():
        shapes = [forms[canonical].shape] if canonical in forms else specs[canonical].parts
        yield from zip(names, shapes, strict=True)


def write_checkpoint(model: ModelConfig, directory: Path) -> None:
    """config.json and shards of float16, as published."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(published_config(model), indent=1))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in published_shapes(model):
        num_bytes = 2 * torch.Size(shape).numel()
        if size + num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    for index, shard in enumerate(shards, 1):
        write_shard(directory / f"model-{index:05d}-of-{len(shards):05d}.safetensors", shard)


def write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = (torch.randn(RANDOM_VALUES) * WEIGHT_STD).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for entry in header.values():
            start, stop = entry["data_offsets"]
            file.seek(8 + len(text) + start)
            file.write(values[: stop - start])


def published_config(model: ModelConfig) -> dict[str, object]:
    decoder, vision, reduction = model.decoder, model.vision, model.reduction
    assert isinstance(vision, HrConfig) and isinstance(reduction, PoolingConfig)
    layers = [
        {"index": each.layer, "kernel_size": each.kernels, "stride": each.kernels} for each in reduction.boundaries
    ]

    return {
        "model_type": "llava",
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "router_token_id": ROUTER_TOKEN,
        "is_multipath_encoder": True,
        "vision_tower_slow": "convnext_xxlarge" if vision.slow.layer_norm_eps > 5e-6 else "convnext_large",
        "input_image_size": vision.image_size,
        "freeze_vision": not vision.has_adapters,
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.hidden_size,
        "vision_config": {
            "hidden_size": vision.fast.hidden_size,
            "intermediate_size": vision.fast.intermediate_size,
            "num_hidden_layers": vision.fast.num_layers,
            "num_attention_heads": vision.fast.num_heads,
            "image_size": CLIP_L["image_size"],
            "patch_size": vision.fast.patch_size,
        },
        "pooling": {"pooling_type": "adaptive", "pooling_layers": layers, "use_special_token": True},
    }


class PeakMemory:
    """Samples the process's memory in a thread."""

    def __init__(self) -> None:
        self.resident, self.anonymous = 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.resident = max(self.resident, resident_bytes() or 0)
            self.anonymous = max(self.anonymous, resident_bytes("RssAnon") or 0)


def main() -> None:
    escape_output()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    shapes = [name for name, shape in SHAPES.items() if isinstance(shape.vision, HrConfig)]
    parser.add_argument("--shape", choices=shapes, default="llava-hr-x-13b")
    parser.add_argument("--directory", type=Path, required=True, help="is made, and removed at the end")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and engine")
    options = parser.parse_args()
    model = SHAPES[options.shape].model("bfloat16")
    try:
        write_checkpoint(model, options.directory / "checkpoint")
        start = time.perf_counter()
        with PeakMemory() as memory:
            engine = build_engine(options.directory / "checkpoint", options.directory / "engine", dtype="bfloat16")
        spent = time.perf_counter() - start
        size = engine.files["weights.safetensors"].bytes
        print(
            f"{options.shape}: engine of {size / 1e9:.1f} GB in {spent:.0f} s, peak of resident memory "
            f"{memory.resident / 1e9:.2f} GB, {memory.anonymous / 1e9:.2f} GB without mapped files"
        )
        assert engine.model.vision == model.vision
    finally:
        if not options.keep:
            shutil.rmtree(options.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
