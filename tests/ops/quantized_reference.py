"""What quantised products, `quantize` and `dequantize` promise, in numpy: exact integers, and float32 in its order.

The promise holds bit by bit, so that instruction sets that meet it agree with each other. Sums of integers are computed
in float64, which has all of them up to 2^53 (131,071 products of bytes stay below 2^31): products of integers are slow.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpn_rt.model.weights.tiles import GROUP

Floats = NDArray[np.float32]
Integers = NDArray[np.float64]
"""Without a part after the point."""


def quantized_rows(x: Tensor) -> tuple[Integers, Floats]:
    """Integers `[num_tokens, in_features]` and scales `[num_tokens]`."""
    rows = x.float().numpy()
    largest = np.abs(rows).max(axis=1, initial=0)
    finite = np.isfinite(largest)
    scales = np.where(finite, largest, np.float32(np.nan)).astype(np.float32) / np.float32(127.5)
    divisors = np.where(finite & (scales > 0), scales, np.float32(1))[:, None]
    usable = np.where((finite & (scales > 0))[:, None], rows, np.float32(0))
    return np.clip(np.rint(usable / divisors), -128, 127).astype(np.float64), scales


def e4m3_rows(x: Tensor) -> tuple[NDArray[np.uint8], Floats]:
    """Codes of 8-bit floats `[num_tokens, in_features]` and scales `[num_tokens]`."""
    rows = x.float().numpy()
    largest = np.abs(rows).max(axis=1, initial=0)
    scales = np.where(np.isfinite(largest), largest, np.float32(np.nan)).astype(np.float32) / np.float32(448)
    usable = np.isfinite(scales) & (scales > 0)
    values = np.where(usable[:, None], rows, np.float32(0)) / np.where(usable, scales, np.float32(1))[:, None]
    return nearest_e4m3(values), scales


def nearest_e4m3(values: Floats) -> NDArray[np.uint8]:
    """The codes of the nearest numbers, of two as near the one with an even code; no more than 448."""
    numbers = e4m3_numbers()
    above = np.searchsorted(numbers, np.abs(values).astype(np.float64)).clip(1, 126)
    magnitudes = np.abs(values).astype(np.float64)
    low, high = magnitudes - numbers[above - 1], numbers[above] - magnitudes
    is_lower = (low < high) | ((low == high) & (above % 2 == 1))
    return ((above - is_lower) | (np.signbit(values) * 0x80)).astype(np.uint8)


def e4m3_numbers() -> NDArray[np.float64]:
    """The numbers of the codes 0 to 126, which ascend: 4 bits of exponent with bias 7, 3 of mantissa."""
    codes = np.arange(127)
    exponents, mantissas = codes >> 3, codes & 7
    return np.where(exponents == 0, mantissas / 512.0, (8 + mantissas) * 2.0 ** (exponents - 10.0))


@np.errstate(over="ignore", invalid="ignore")
def dequantized(sums: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The result without an activation, bit by bit. `sums` has `[num_tokens, out_features]` of what is read."""
    return _finish(sums.numpy().astype(np.float32) * row_scale.numpy()[:, None] * scale.numpy(), bias, dtype)


def _finish(sums: Floats, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    result = sums if bias is None else sums + bias.float().numpy()
    return torch.from_numpy(result.astype(np.float32)).to(dtype)


def _sums(a: Integers, weights: NDArray[np.int8]) -> Floats:
    """The product of integers, rounded once."""
    product: Floats = (torch.from_numpy(a) @ torch.from_numpy(weights).double().T).float().numpy()
    return product


@np.errstate(over="ignore")  # as in the kernels, a large number becomes infinity
def int8_reference(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """The result, bit by bit, in `dtype` or that of `x`. `q` is `[out_features, in_features]` int8."""
    a, s = quantized_rows(x)
    return _finish(_sums(a, q.numpy()) * s[:, None] * scale.numpy(), bias, dtype or x.dtype)


@np.errstate(over="ignore")
def int4_reference(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """The result, bit by bit, in `dtype` or that of `x`. `scale` is `[out_features, groups]`."""
    a, s = quantized_rows(x)
    weights, scales = q.numpy(), scale.float().numpy()
    sums = np.zeros((len(a), len(weights)), np.float32)
    for group in range(scales.shape[1]):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        sums += _sums(a[:, columns], weights[:, columns]) * scales[:, group]
    return _finish(sums * s[:, None], bias, dtype or x.dtype)


def exact_product(x: Tensor, dequantized: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product of the rounded rows in float64, and a bound on what float32 may round away of it."""
    a, s = quantized_rows(x)
    rows = torch.from_numpy(a * s.astype(np.float64)[:, None])
    magnitudes = rows.abs() @ dequantized.abs().T
    product = rows @ dequantized.T
    if bias is not None:
        product, magnitudes = product + bias.double(), magnitudes + bias.double().abs()
    return product, magnitudes
