"""Products with weights in 8 and 4 bits, beside torch's with the same weight in the dtype of the activations, prepacked
where torch can. Their share of the limit is more than 100 % where they multiply faster than torch's matrix product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring.clock import Run
from benchmarks.op_cases.cases import Case, KernelShapes
from dpn_rt import ops
from dpn_rt.backends.kernels.gpu import FP8_CAPABILITY
from dpn_rt.model.weights.row_major import row_major_products


def quantized_cases(s: KernelShapes, dtype: torch.dtype) -> list[Case]:
    """Few and many rows, on the two largest matrices of a decoder layer; CPU only."""
    return [_case(bits, rows, *size, dtype) for bits in (8, 4) for size in _sizes(s) for rows in (1, 8, s.rows)]


def row_major_cases(s: KernelShapes, dtype: torch.dtype) -> list[Case]:
    """The same in 8 bits on a GPU: two kernels and a library's product."""
    forms = [torch.int8, *([torch.float8_e4m3fn] if torch.cuda.get_device_capability() >= FP8_CAPABILITY else [])]
    return [_row_major(form, rows, *size, dtype) for form in forms for size in _sizes(s) for rows in (1, 8, s.rows)]


def _sizes(s: KernelShapes) -> list[tuple[int, int]]:
    return [(s.hidden, 2 * s.ffn), (s.ffn, s.hidden)]


def _row_major(form: torch.dtype, rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> Case:
    def inputs() -> tuple[Run, Run]:
        x, weight = torch.randn(rows, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)
        matrix, scale = ops.quantize(weight, form)
        product = row_major_products(matrix, scale, None, None).many_rows
        return lambda: product(x), lambda: F.linear(x, weight)

    name = str(form).removeprefix("torch.")
    count = in_features * out_features
    return Case(f"row_major_{name}", f"{rows} x {in_features} -> {out_features}", inputs, count, flops=2 * rows * count)


def _case(bits: int, rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> Case:
    panels, groups, count = -(-out_features // 16), -(-in_features // 128), in_features * out_features

    def inputs() -> tuple[Run, Run]:
        x = torch.randn(rows, in_features).to(dtype)
        tiles = torch.randint(256, (panels, in_features * bits // 32, 16, 4), dtype=torch.uint8)
        in_torch = _torch_product(x, torch.randn(out_features, in_features).to(dtype))
        if bits == 8:
            scale = torch.rand(out_features)
            return lambda: ops.linear_int8(x, tiles, scale), in_torch
        group_scale = torch.rand(panels, groups, 16).bfloat16()
        return lambda: ops.linear_int4(x, tiles, group_scale), in_torch

    scale_bytes = 4 * out_features if bits == 8 else 2 * groups * out_features
    shape = f"{rows} x {in_features} -> {out_features}"
    return Case(f"linear_int{bits}", shape, inputs, count * bits // 8 + scale_bytes, flops=2 * rows * count)


def _torch_product(x: Tensor, weight: Tensor) -> Run:
    if x.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return lambda: F.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
