"""Matrices in 8 bits row by row, as the libraries of GPUs multiply them with rows in 8 bits (W8A8)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.model.weights.product import Products, activated, one_product
from dpn_rt.schema.activation import ProductActivation

ALIGNMENT = 16
"""Of rows and columns. cuBLAS takes multiples of 16 in float8, of 8 in int8 (`torch._scaled_mm`, `torch._int_mm`)."""
LEAST_ROWS = 32
"""Of x: `torch._int_mm` takes more than 16 on a GPU, and float8 products of fewer have slower kernels."""


def aligned(matrix: Tensor) -> Tensor:
    """`[out_features, in_features]` with zeros up to multiples of `ALIGNMENT`; not copied where it has them."""
    rows, columns = (-size % ALIGNMENT for size in matrix.shape)
    if not rows and not columns:
        return matrix.contiguous()
    padded = functional.pad(matrix.view(torch.uint8), (0, columns, 0, rows))  # not every dtype can be padded
    return padded.view(matrix.dtype)


def row_major_products(
    matrix: Tensor, scale: Tensor, bias: Tensor | None, activation: ProductActivation | None
) -> Products:
    """The products of a matrix in 8 bits, on a GPU: three launches whatever the number of rows, a fourth for a gate.

    Rows of x are rounded to the matrix's dtype, a library multiplies, then come scales, bias and activation. Sums of
    int8 are exact, so a row's result does not depend on the others; those of float8 are float32, in any order.
    Nothing waits for the device, so that the launches can be recorded.

    Args:
        matrix: `[rows, columns]` int8 or float8_e4m3fn, contiguous; rows after `out_features` and columns after
            `in_features` are zeros. On a GPU both are multiples of `ALIGNMENT`.
        scale: `[out_features]` float32, of each row.
        bias: `[out_features]`, dtype of the activations.
        activation: applied before the result is rounded; a gate after.
    """
    transposed, multiply = matrix.t(), _multiplication(matrix)
    of_numbers = None if activation == "silu_mul" else activation

    def product(x: Tensor) -> Tensor:
        q, row_scale = ops.quantize(x, matrix.dtype, num_rows=max(len(x), LEAST_ROWS), columns=matrix.shape[1])
        return ops.dequantize(multiply(q, transposed), row_scale, scale, bias, of_numbers, dtype=x.dtype)

    return one_product(product if of_numbers == activation else activated(product, activation))


def _multiplication(matrix: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The library's product `[rows, columns]` of two matrices in 8 bits: int32, or float32 of float8."""
    if matrix.dtype == torch.int8:
        return torch._int_mm
    # Not every GPU takes scales of rows here (docs/quantization.md); ours come after the sums, as in int8.
    one = torch.ones((), device=matrix.device)
    return lambda x, weight: torch._scaled_mm(x, weight, one, one, out_dtype=torch.float32)
