"""The products of a linear layer: our kernel, oneDNN with a prepacked weight, or torch. Only this module chooses.

Device and dtype are known at load and decide then; a call looks at its number of rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from dpn_rt.model.weights.tiles import TILE_ROWS
from dpn_rt.schema.activation import ProductActivation
from dpn_rt.tuning.cpu_choices import cpu_choices, default_choices

SIZES_PER_OCTAVE = 16
"""Of `few_sizes`: numbers of rows between two powers of two."""

_ONEDNN_ACTIVATIONS: Mapping[str | None, tuple[str, str]] = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
"""Activations that oneDNN applies to a product: its name of the function, and of the algorithm."""

Product = Callable[[Tensor], Tensor]
"""`x` `[num_tokens, in_features]` -> `activation(x @ weight.T + bias)` `[num_tokens, out_features]`.

Sums are float32; without an activation it is the sum. `silu_mul` leaves half as many columns."""


@dataclass(frozen=True)
class Products:
    """The two products of one linear layer."""

    few_rows: Product
    many_rows: Product
    most_few_rows: int
    """Rows up to which `few_rows` is taken."""


def dense_products(
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    activation: ProductActivation | None = None,
    *,
    ragged: bool = True,
) -> Products:
    """The products of a weight in the dtype of the activations.

    A few rows (decoding) are bound by reading the weight and go through our kernel, from the mapped file or its copy.
    Many rows go to oneDNN (bfloat16) or MKL (float32) through torch. So does everything on a GPU, and what our kernel
    does not take: float16 on the CPU.

    Args:
        weight: `[out_features, in_features]`, contiguous.
        packed: `weight` in oneDNN's own layout; None: without.
        bias: `[out_features]`, contiguous, dtype and device of `weight`.
        activation: applied to the result. oneDNN applies GELUs before it stores the result.
        ragged: see `Weight.products`.

    Raises:
        KernelArgumentError: weight or bias has the wrong shape, dtype, device or layout.
    """
    _check_operands(weight, bias)
    if not weight.is_cpu:
        on_device = activated(partial(functional.linear, weight=weight, bias=bias), activation)
        return Products(on_device, on_device, most_few_rows=0)
    if weight.dtype == torch.bfloat16:
        many_rows = _onednn_products(weight, packed, bias, activation, ragged)
    else:
        many_rows = activated(partial(_torch_product, weight=weight, bias=bias), activation)
    if weight.dtype not in (torch.bfloat16, torch.float32):
        return Products(many_rows, many_rows, most_few_rows=0)
    choices = cpu_choices() if weight.dtype == torch.bfloat16 else default_choices()
    few_rows = activated(partial(ops.linear, weight=weight, bias=bias), activation)
    return Products(few_rows, many_rows, choices.most_streamed_rows)


def one_product(product: Product) -> Products:
    """The products of a weight whose kernel takes any number of rows."""
    return Products(product, product, most_few_rows=0)


def tiled_product(
    kernel: Callable[..., Tensor], num_rows: int, activation: ProductActivation | None = None, **operands: Tensor | None
) -> Product:
    """The product of a matrix in tiles, by a kernel that applies the activation too.

    Args:
        kernel: `ops.linear_int8` or `ops.linear_int4`.
        num_rows: of the matrix. A gate is applied by the kernel if both halves of them are whole tiles.
        activation: of the result.
        operands: the kernel's.
    """
    is_fused = activation != "silu_mul" or num_rows % (2 * TILE_ROWS) == 0
    product = partial(kernel, **operands, activation=activation if is_fused else None)
    return product if is_fused else activated(product, activation)


def activated(product: Product, activation: ProductActivation | None) -> Product:
    """`product`, then an activation: a GELU in the memory of its result, a gate in new memory."""
    if activation is None:
        return product
    if activation == "silu_mul":
        return lambda x: ops.silu_mul(product(x))

    def run(x: Tensor) -> Tensor:
        result = product(x)
        return ops.activation(result, activation, out=result)

    return run


def few_sizes(num_rows: int) -> int:
    """The next of few numbers, `SIZES_PER_OCTAVE` between two powers of two: at most that share of work is added."""
    step = max(1, (1 << num_rows.bit_length() - 1) // SIZES_PER_OCTAVE)
    return -(-num_rows // step) * step


def _torch_product(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_rows(x, weight)
    return functional.linear(x, weight, bias)


def _onednn_products(
    weight: Tensor, packed: Tensor | None, bias: Tensor | None, activation: ProductActivation | None, ragged: bool
) -> Product:
    fused = _ONEDNN_ACTIVATIONS.get(activation) if packed is not None else None
    product: Product = partial(
        _onednn_product, weight=weight, packed=packed, bias=bias, fused=fused or ("none", "none")
    )
    if ragged:
        product = _with_few_sizes(product, weight)
    return product if fused else activated(product, activation)


def _with_few_sizes(product: Product, weight: Tensor) -> Product:
    """oneDNN compiles a product for every number of rows (0.3 to 1.5 ms, half a megabyte that is kept for 1,024 of
    them), and ragged batches hardly ever have the same number twice: rows of zeros make the numbers few."""

    def run(x: Tensor) -> Tensor:
        _check_rows(x, weight)
        num_rows = x.shape[0]
        padding = few_sizes(num_rows) - num_rows
        return product(functional.pad(x, (0, 0, 0, padding)))[:num_rows] if padding else product(x)

    return run


def _onednn_product(
    x: Tensor, *, weight: Tensor, packed: Tensor | None, bias: Tensor | None, fused: tuple[str, str]
) -> Tensor:
    _check_rows(x, weight)
    if packed is None:
        return functional.linear(x, weight, bias)
    activation, algorithm = fused
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], algorithm)
    return result


def _check_operands(weight: Tensor, bias: Tensor | None) -> None:
    """torch would broadcast a bias of another shape; what else is wrong would show at the first call only."""
    _check("weight", weight, 2, "[out_features, in_features]")
    if bias is None:
        return
    _check("bias", bias, 1, "[out_features]")
    if bias.shape[0] != weight.shape[0]:
        raise KernelArgumentError(f"linear: bias has shape {list(bias.shape)}, expected [{weight.shape[0]}]")
    if bias.dtype != weight.dtype or bias.device != weight.device:
        raise KernelArgumentError(
            f"linear: bias is {bias.dtype} on {bias.device}, expected {weight.dtype} on {weight.device}"
        )


def _check(name: str, tensor: Tensor, num_dims: int, shape: str) -> None:
    if tensor.layout != torch.strided:
        raise KernelArgumentError(f"linear: {name} has layout {tensor.layout}, expected {torch.strided}")
    if tensor.ndim != num_dims:
        raise KernelArgumentError(f"linear: {name} has shape {list(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise KernelArgumentError(f"linear: {name} has strides {tensor.stride()}, expected a contiguous tensor")


def _check_rows(x: Tensor, weight: Tensor) -> None:
    """What our kernel checks too; torch would multiply other dimensions than rows, and explain the rest less well."""
    if x.layout != torch.strided:
        raise KernelArgumentError(f"linear: x has layout {x.layout}, expected {torch.strided}")
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        expected = f"[num_tokens, in_features={weight.shape[1]}]"
        raise KernelArgumentError(f"linear: x has shape {list(x.shape)}, expected {expected}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise KernelArgumentError(f"linear: x is {x.dtype} on {x.device}, expected {weight.dtype} on {weight.device}")
