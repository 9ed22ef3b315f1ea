"""What `linear_int8` and `linear_int4` promise, in numpy: integers exactly, and float32 operations in their order.

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


def _finish(sums: Floats, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    result = sums if bias is None else sums + bias.float().numpy()
    return torch.from_numpy(result.astype(np.float32)).to(dtype)


def _sums(a: Integers, weights: NDArray[np.int8]) -> Floats:
    """The product of integers, rounded once."""
    product: Floats = (torch.from_numpy(a) @ torch.from_numpy(weights).double().T).float().numpy()
    return product


@np.errstate(over="ignore")  # as in the kernels, a large number becomes infinity
def int8_reference(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The result, bit by bit. `q` is `[out_features, in_features]` int8."""
    a, s = quantized_rows(x)
    return _finish(_sums(a, q.numpy()) * s[:, None] * scale.numpy(), bias, x.dtype)


@np.errstate(over="ignore")
def int4_reference(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The result, bit by bit. `scale` is `[out_features, groups]`."""
    a, s = quantized_rows(x)
    weights, scales = q.numpy(), scale.float().numpy()
    sums = np.zeros((len(a), len(weights)), np.float32)
    for group in range(scales.shape[1]):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        sums += _sums(a[:, columns], weights[:, columns]) * scales[:, group]
    return _finish(sums * s[:, None], bias, x.dtype)


def exact_product(x: Tensor, dequantized: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product of the rounded rows in float64, and a bound on what float32 may round away of it."""
    a, s = quantized_rows(x)
    rows = torch.from_numpy(a * s.astype(np.float64)[:, None])
    magnitudes = rows.abs() @ dequantized.abs().T
    product = rows @ dequantized.T
    if bias is not None:
        product, magnitudes = product + bias.double(), magnitudes + bias.double().abs()
    return product, magnitudes
