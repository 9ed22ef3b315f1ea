"""Calls of the kernels as JSON: the name of an op, and its arguments, of which tensors are descriptions.

A tensor is `{"dtype": "int32", "shape": [3], "strides": [1], "values": [0, 2, 5]}`. Without strides it is contiguous.
Its memory holds as much as its strides reach, and nothing after that: `values` from the first element on, again and
again, or random numbers. `{"like": "q"}` is the tensor of another argument itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpn_rt import ops

Json = dict[str, Any]
MOST_ELEMENTS = 1 << 18
"""Of a tensor's memory, and of all of its elements."""


class NotACallError(Exception):
    """An input that describes no call."""


def floats(*shape: int, dtype: str = "float32", **more: Any) -> Json:
    return {"dtype": dtype, "shape": list(shape), **more}


def ints(*values: int, dtype: str = "int32", shape: list[int] | None = None) -> Json:
    return {"dtype": dtype, "shape": [len(values)] if shape is None else shape, "values": list(values)}


def _advance_layout(layout: Any, **arguments: Any) -> object:
    return ops.advance_layout(ops.DeviceLayout(**layout), **arguments)


OPS: dict[str, Callable[..., object]] = {
    **{name: getattr(ops, name) for name in ops.__all__ if name[0].islower() and "isa" not in name},
    "advance_layout": _advance_layout,
}
KERNELS = ints(1, 1, 1, 2, 2, 2, shape=[3, 2])
PAGED = {
    "kv_cache": floats(6, 2, 2, 2, 4, 16),
    "layer_in_block": 1,
    "block_table": ints(0, 3, 5, 1, 2, 4, shape=[2, 3]),
}
HEADS = {"q": floats(7, 4, 16), "k": floats(7, 2, 16), "v": floats(7, 2, 16), "cu_seqlens": ints(0, 2, 7)}
SEGMENTS = {"segment_queries": ints(0, 1, 1), "segment_starts": ints(0, 1, 3), "cu_scores": ints(0, 2, 3, 5)}
SAMPLED = {
    "temperatures": floats(3),
    "top_k": ints(0, 5, -1),
    "top_p": floats(3, dtype="float64"),
    "min_p": floats(3),
    "keys": ints(1, -2, 3, dtype="int64"),
    "positions": ints(0, 1, 2, dtype="int64"),
}
# Two sequences: text and an image of 4 x 4 and a router row, then text alone.
IMAGES = {
    "cu_seqlens": ints(0, 20, 25),
    "cu_images": ints(0, 1, 1),
    "image_starts": ints(2),
    "grids": ints(4, 4, shape=[1, 2]),
}
LAYOUT = {
    **IMAGES,
    "first_positions": ints(0, 3),
    "first_cache_rows": ints(0, 2),
    "router_rows": ints(19, 24),
    "cu_router_rows": ints(0, 1, 2),
    "positions": ints(0, shape=[25]),
    "cache_rows": ints(0, shape=[25]),
}
ROUTER = {
    "hidden": floats(9, 32),
    "router_rows": ints(2, 3, 8),
    "cu_router_rows": ints(0, 2, 2, 3),
    "predictor": floats(3, 8),
    "norm_weight": floats(32),
    "norm_bias": floats(32),
    "hidden_weight": floats(8, 32),
    "eps": 1e-5,
}
CALLS: list[tuple[str, Json]] = [
    ("attention", {**HEADS, "causal": True, "scale": 0.25}),
    ("attention", {**HEADS, "causal": False, "scale": 0.25, "out": floats(7, 64)}),
    ("attention", {**HEADS, "causal": True, "scale": 0.25, "first_keys": ints(0, 1, 0, 0, 1, 1, 4)}),
    (
        "attention_extend",
        {
            "q": HEADS["q"],
            **PAGED,
            "cu_seqlens": ints(0, 2, 7),
            "context_lens": ints(9, 5),
            "scale": 0.25,
            "first_keys": ints(6, 7, 0, 0, 1, 1, 4),
        },
    ),
    (
        "attention_decode",
        {"q": floats(2, 4, 16), **PAGED, "context_lens": ints(12, 1), "scale": 0.25, "first_keys": ints(5, 0)},
    ),
    (
        "last_row_scores",
        {"q": floats(2, 4, 16), "k": HEADS["k"], "cu_seqlens": ints(0, 2, 7), **SEGMENTS, "scale": 0.3},
    ),
    (
        "last_row_scores_paged",
        {
            "q": floats(2, 4, 16),
            "blocks": PAGED["kv_cache"],
            "layer_in_block": 0,
            "block_table": PAGED["block_table"],
            "kv_lengths": ints(12, 6),
            **SEGMENTS,
            "scale": 0.3,
            "first_keys": ints(1, 4),
        },
    ),
    (
        "rope_store",
        {
            "qkv": floats(7, 128),
            "positions": ints(0, 1, 4, 5, 6, 7, 8),
            "cache_rows": ints(0, 1, 4, 5, 6, 7, 8),
            "cos_sin": floats(16, 16),
            **PAGED,
            "cu_seqlens": ints(0, 2, 7),
            "num_heads": 4,
            "num_kv_heads": 2,
            "q_norm": floats(16),
            "k_norm": floats(16),
            "eps": 1e-6,
        },
    ),
    (
        "pool",
        {
            **IMAGES,
            "x": floats(25, 16),
            "experts": ints(2),
            "kernels": KERNELS,
            "out_cu_seqlens": ints(0, 8, 13),
            "scales": floats(1),
            "function": "max",
        },
    ),
    (
        "pool",
        {
            **IMAGES,
            "x": floats(25, 16),
            "experts": ints(1),
            "kernels": KERNELS,
            "out_cu_seqlens": ints(0, 12, 17),
            "function": "conv",
            "conv_weights": [floats(1, 16), floats(2, 16), floats(4, 16)],
        },
    ),
    (
        "kept_rows",
        {
            "cu_seqlens": ints(0, 20, 25),
            "cu_images": ints(0, 1, 1),
            "image_starts": ints(2),
            "image_lengths": ints(16),
            "kept": ints(0, 3, 15),
            "cu_kept": ints(0, 3),
            "out_cu_seqlens": ints(0, 7, 12),
        },
    ),
    ("segmented_top_k", {"scores": floats(9), "cu_scores": ints(0, 4, 4, 9), "cu_kept": ints(0, 2, 2, 7)}),
    (
        "advance_layout",
        {
            "layout": LAYOUT,
            "kernels": KERNELS,
            "min_visual_tokens": 4,
            "routed": ints(2, 1),
            "probs": floats(2, 3),
            "forced": ints(-1, 0),
        },
    ),
    ("route", {**ROUTER, "biases": floats(3), "levels": ints(0, 1, 2)}),
    (
        "route",
        {"hidden": floats(9, 32), "router_rows": ints(2), "cu_router_rows": ints(0, 1), "predictor": floats(3, 32)},
    ),
    ("sample", {"logits": floats(3, 50), **SAMPLED}),
    ("sample_greedy", {"logits": floats(3, 50, strides=[64, 1])}),
    ("linear", {"x": floats(3, 24), "weight": floats(20, 24), "bias": floats(20), "out": floats(3, 20)}),
    (
        "linear_int8",
        {
            "x": floats(3, 36),
            "weight": ints(1, 200, 128, shape=[2, 9, 16, 4], dtype="uint8"),
            "scale": floats(20),
            "bias": floats(20),
            "activation": None,
        },
    ),
    (
        "linear_int8",
        {
            "x": floats(3, 36),
            "weight": ints(1, 200, 128, shape=[4, 9, 16, 4], dtype="uint8"),
            "scale": floats(64),
            "bias": floats(64),
            "activation": "silu_mul",
        },
    ),
    (
        "linear_int4",
        {
            "x": floats(3, 136),
            "weight": ints(1, 200, 128, shape=[2, 17, 16, 4], dtype="uint8"),
            "scale": floats(2, 2, 16, dtype="bfloat16"),
            "bias": floats(20),
            "activation": "gelu",
        },
    ),
    ("quantize", {"x": floats(3, 36), "dtype": None, "out": floats(4, 40, dtype="int8"), "scale": floats(3)}),
    (
        "dequantize",
        {
            "sums": ints(1, -500, 70000, shape=[4, 24]),
            "row_scale": floats(3),
            "scale": floats(20),
            "bias": floats(20),
            "activation": "gelu",
            "out": floats(3, 20),
        },
    ),
    ("rms_norm", {"x": floats(3, 40, strides=[48, 1]), "weight": floats(40), "eps": 1e-5}),
    (
        "add_rms_norm",
        {"x": floats(3, 40), "residual": floats(3, 40), "weight": floats(40), "eps": 1e-5, "out": {"like": "x"}},
    ),
    ("layer_norm", {"x": floats(3, 40), "weight": floats(40), "bias": floats(40), "eps": 1e-5}),
    (
        "add_layer_norm",
        {"x": floats(3, 40), "residual": floats(3, 40), "weight": floats(40), "bias": floats(40), "eps": 0},
    ),
    ("activation", {"x": floats(3, 40), "kind": "gelu", "out": {"like": "x"}}),
    ("activation", {"x": floats(3, 40), "kind": "quick_gelu"}),
    ("silu_mul", {"gate_up": floats(3, 80, strides=[96, 1]), "out": floats(3, 40)}),
    ("embedding", {"table": floats(9, 16), "token_ids": ints(8, -1, 0, dtype="int64")}),
    (
        "embedding",
        {
            "table": ints(7, 200, shape=[2, 3, 16, 4], dtype="uint8"),
            "token_ids": ints(17, 3, dtype="int64"),
            "scale": {**ints(2, shape=[18]), "dtype": "float32", "values": [0.5]},
            "out": floats(2, 10),
        },
    ),
    ("depthwise_conv", {"x": floats(1, 5, 6, 16), "taps": floats(49, 16), "bias": floats(16)}),
]


def in_dtype(value: Any, dtype: str) -> Any:
    """A description with another dtype for its tensors in float32."""
    if isinstance(value, list):
        return [in_dtype(item, dtype) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {key: in_dtype(item, dtype) for key, item in value.items()}
    return {**changed, "dtype": dtype} if value.get("dtype") == "float32" else changed


def arguments_of(described: Any) -> Json:
    """The arguments of a call.

    Raises:
        NotACallError: a description is none of a tensor.
    """
    if not isinstance(described, dict):
        raise NotACallError
    made = {name: _value(item) for name, item in described.items()}
    for name, item in described.items():
        if isinstance(item, dict) and set(item) == {"like"}:
            made[name] = made.get(str(item["like"]))
    return made


def _value(described: Any) -> Any:
    if isinstance(described, list):
        return [_value(item) for item in described]
    if isinstance(described, dict) and "dtype" not in described:
        return None if set(described) == {"like"} else arguments_of(described)
    return _tensor(described) if isinstance(described, dict) else described


def _tensor(described: Json) -> Tensor:
    dtype, shape = getattr(torch, str(described["dtype"]), None), described.get("shape")
    if not isinstance(dtype, torch.dtype) or not _are_sizes(shape):
        raise NotACallError
    contiguous = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    strides = described.get("strides", contiguous)
    if not _are_sizes(strides) or len(strides) != len(shape) or math.prod(shape) > MOST_ELEMENTS:
        raise NotACallError
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    if reach > MOST_ELEMENTS:
        raise NotACallError
    values = described.get("values")
    if isinstance(values, list) and values and all(isinstance(value, int | float) for value in values):
        numbers = torch.tensor([_small(value) for value in values], dtype=torch.float64).repeat(
            reach // len(values) + 1
        )
        memory = numbers[:reach].to(torch.int64).to(dtype) if not dtype.is_floating_point else numbers[:reach].to(dtype)
    else:
        memory = torch.rand(reach).to(dtype)
    return memory.clone().as_strided(shape, strides)


def _small(value: float) -> float:
    """Within 32 bits and a little more, which is where a kernel's numbers end."""
    return 0.0 if not math.isfinite(value) else float(max(-(2**33), min(2**33, value)))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 10 and all(type(n) is int and 0 <= n < 2**40 for n in value)
