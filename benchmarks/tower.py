"""LLaVA-HR's vision tower, part by part: dpn_rt, eager PyTorch and the limit of products and convolutions, in one run.

    python benchmarks/tower.py --shape llava-hr-1b --json tower.json

Weights are random. Every round runs every row once, forwards and backwards in turn. Times are medians over the rounds,
and ratios are taken round by round. The eager tower is ConvNeXt in timm's form and transformers' CLIP, with channels
first or last in memory; the ratio is to the faster one. The limit is the time of every matrix product and depthwise
convolution of the tower alone, each by torch's own library.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if not __package__:  # run as a file: `benchmarks` is found in the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring.clock import Run, seconds
from benchmarks.measuring.machine import machine
from benchmarks.measuring.result_file import write_json
from benchmarks.measuring.samples import Samples, paired_ratio
from benchmarks.models.shapes import SHAPES, random_weights
from dpn_rt.format import flops
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.vision.encoder import load_encoder
from dpn_rt.model.vision.hr.config import HrConfig
from dpn_rt.model.vision.hr.convnext_config import KERNEL, MLP_RATIO, STEM_STRIDE
from dpn_rt.model.vision.hr.encoder import HrEncoder
from dpn_rt.model.weights.dense import can_prepack
from dpn_rt.reference.hr import HrTower
from dpn_rt.schema.weights import TORCH_DTYPES
from dpn_rt.terminal import escape_output

PARTS = ("slow", "fast and mix", "tower")
LIMIT_ROWS = 8192
"""Rows of a product whose rate is measured, at most: more do not make it faster."""
LAYOUTS = {"eager": torch.contiguous_format, "eager channels last": torch.channels_last}


@dataclass(frozen=True)
class Product:
    """A matrix product of the tower, and how often it is computed."""

    rows: int
    in_features: int
    out_features: int
    count: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.in_features * self.out_features * self.count


@dataclass
class Row:
    subject: str
    part: str
    run: Run
    flops: int
    times: Samples = field(default_factory=Samples)


def products(vision: HrConfig, part: str) -> Iterator[Product]:
    """The matrix products of a part."""
    if part in ("slow", "tower"):
        channels, taps = 3, STEM_STRIDE**2
        for stage, (depth, dim) in enumerate(zip(vision.slow.depths, vision.slow.dims, strict=True)):
            pixels = vision.slow.side(vision.image_size, stage) ** 2
            yield Product(pixels, taps * channels, dim, 1)
            yield Product(pixels, dim, MLP_RATIO * dim, depth)
            yield Product(pixels, MLP_RATIO * dim, dim, depth)
            channels, taps = dim, 4
    if part in ("fast and mix", "tower"):
        fast, size, channels = vision.fast, vision.hidden_size, vision.slow.dims[-1]
        rows, slow_rows = fast.num_rows, vision.slow_side**2
        yield Product(rows, 3 * fast.patch_size**2, size, 1)
        for columns, width in ((size, 3 * size), (size, size), (size, fast.intermediate_size)):
            yield Product(rows, columns, width, fast.num_layers)
        yield Product(rows, fast.intermediate_size, size, fast.num_layers)
        yield Product(rows, size, rows, 2 * fast.num_layers)  # attention, of all heads
        for columns, width in ((channels, channels), (channels, size)):
            yield Product(slow_rows, columns, width, vision.num_adapters)
        yield Product(rows, size, size, vision.num_adapters + 1)
        yield Product(rows, channels, size, 1)


def convolutions(vision: HrConfig, part: str) -> Iterator[tuple[int, int, int]]:
    """Side, channels and count of the depthwise convolutions of a part."""
    if part in ("slow", "tower"):
        for stage, (depth, dim) in enumerate(zip(vision.slow.depths, vision.slow.dims, strict=True)):
            yield vision.slow.side(vision.image_size, stage), dim, depth
    if part in ("fast and mix", "tower"):
        yield vision.fast.grid[0], vision.hidden_size, vision.num_adapters


class Limit:
    """Time of all products and convolutions of a part, each measured alone on new memory."""

    def __init__(self, vision: HrConfig, part: str, dtype: torch.dtype) -> None:
        self._work: list[tuple[Callable[[], object], float]] = []
        for product in products(vision, part):
            rows = min(product.rows, LIMIT_ROWS)
            run = linear(rows, product.in_features, product.out_features, dtype)
            self._work.append((run, product.rows / rows * product.count))
        for side, channels, count in convolutions(vision, part):
            self._work.append((convolution(side, channels, dtype), count))

    def measure(self) -> float:
        """Seconds, after a pass that warms up."""
        for run, _ in self._work:
            run()
        return sum(seconds(run) * count for run, count in self._work)


def linear(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> Run:
    x, weight = torch.randn(rows, in_features, dtype=dtype), torch.randn(out_features, in_features, dtype=dtype)
    if not can_prepack(dtype):
        return lambda: F.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def convolution(side: int, channels: int, dtype: torch.dtype) -> Run:
    x = torch.randn(1, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels, 1, KERNEL, KERNEL, dtype=dtype), torch.randn(channels, dtype=dtype)
    return lambda: F.conv2d(x, weight, bias, padding=KERNEL // 2, groups=channels)


def load_rows(model: ModelConfig, subjects: Sequence[str]) -> tuple[list[Row], Tensor]:
    """The rows, and the pixels that they all see. Towers share no memory."""
    vision = model.vision
    assert isinstance(vision, HrConfig)
    dtype = TORCH_DTYPES[model.dtype]
    names = [*(name for name, _ in vision.weight_specs(dtype))]
    weights = {name: tensor for name, tensor in random_weights(model) if name in names or name.startswith("projector")}
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    small = pixels.to(dtype)
    part_flops = {"slow": vision.slow.flops(vision.image_size), "tower": flops.vision_flops(model)}
    part_flops["fast and mix"] = part_flops["tower"] - part_flops["slow"]
    rows = []
    if "dpn_rt" in subjects:
        encoder = load_encoder(vision, model.projector, weights, prepack=can_prepack(dtype))
        assert isinstance(encoder, HrEncoder)
        slow = encoder.slow.forward(pixels)
        runs: dict[str, Run] = {
            "slow": lambda: encoder.slow.forward(pixels),
            "fast and mix": lambda: encoder.mixed(slow, pixels),
            "tower": lambda: encoder.forward((pixels,)),
        }
        rows += [Row("dpn_rt", part, runs[part], part_flops[part]) for part in PARTS]
    for subject, layout in LAYOUTS.items():
        if subject in subjects:
            rows += eager_rows(subject, layout, vision, pixels, small, part_flops)
    return rows, pixels


def eager_rows(
    subject: str, layout: torch.memory_format, vision: HrConfig, pixels: Tensor, small: Tensor, work: dict[str, int]
) -> list[Row]:
    tower: Any = HrTower(vision).to(small.dtype).eval().to(memory_format=layout)
    seen = small.contiguous(memory_format=layout)
    slow = tower.slow_features(seen)
    runs: dict[str, Run] = {
        "slow": lambda: tower.slow_features(seen),
        "fast and mix": lambda: tower.mixed(slow, pixels),
        "tower": lambda: tower.mixed(tower.slow_features(seen), pixels),
    }
    return [Row(subject, part, runs[part], work[part]) for part in PARTS]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows in all rounds."""
    model = SHAPES[options.shape].model(options.dtype)
    assert isinstance(model.vision, HrConfig)
    dtype = TORCH_DTYPES[options.dtype]
    with torch.inference_mode():
        rows, _ = load_rows(model, options.subjects)
        limits = {part: (Limit(model.vision, part, dtype), Samples()) for part in PARTS}
        for repeat in range(-1, options.repeats):  # the first round warms up
            for row in rows if repeat % 2 else rows[::-1]:
                spent = seconds(row.run)
                if repeat >= 0:
                    row.times.add(spent)
            for limit, samples in limits.values():
                spent = limit.measure()
                if repeat >= 0:
                    samples.add(spent)
    return summary(options, rows, {part: samples for part, (_, samples) in limits.items()})


def summary(options: argparse.Namespace, rows: Sequence[Row], limits: dict[str, Samples]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "benchmark": "tower",
        "shape": options.shape,
        "dtype": options.dtype,
        "machine": machine("cpu"),
        "limits": {part: samples.to_json() for part, samples in limits.items()},
        "rows": [],
    }
    for row in rows:
        entry = {"subject": row.subject, "part": row.part, "flops": row.flops, "seconds": row.times.to_json()}
        entry["of limit"] = paired_ratio(limits[row.part], row.times).to_json()
        eager = [other for other in rows if other.part == row.part and other.subject in LAYOUTS]
        if row.subject == "dpn_rt" and eager:
            fastest = min(eager, key=lambda other: other.times.median)
            entry["faster than"] = fastest.subject
            entry["speedup"] = paired_ratio(fastest.times, row.times).to_json()
        result["rows"].append(entry)
    return result


def print_rows(result: dict[str, Any]) -> None:
    print(f"{result['shape']} {result['dtype']}")
    print(f"{'subject':<20} {'part':<13} {'ms':>8} {'TFLOP/s':>8} {'of limit':>8} {'speedup':>8}")
    for row in result["rows"]:
        median = row["seconds"]["median"]
        speedup = f"{row['speedup']['median']:.2f}" if "speedup" in row else "-"
        print(
            f"{row['subject']:<20} {row['part']:<13} {median * 1e3:8.1f} {row['flops'] / median / 1e12:8.3f} "
            f"{row['of limit']['median']:8.2f} {speedup:>8}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    escape_output()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    shapes = [name for name, shape in SHAPES.items() if isinstance(shape.vision, HrConfig)]
    parser.add_argument("--shape", choices=shapes, default="llava-hr-1b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--subjects", nargs="+", choices=("dpn_rt", *LAYOUTS), default=["dpn_rt", *LAYOUTS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    result = measure(options)
    print_rows(result)
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
