"""The pieces of a LLaMA layer as TensorRT layers. Tensors are `[batch, rows, features]` unless a name says otherwise.

Norms, rotary embedding and gating are computed in float32 for every dtype; TensorRT fuses the casts away.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dpn_rt.backends.tensorrt.library import data_type
from dpn_rt.errors import PlanError

Tensor = Any
"""TensorRT's ITensor; its bindings have no types."""


class Graph:
    """A network under construction, and the dtype of its matrices."""

    def __init__(self, library: ModuleType, network: Any, dtype: torch.dtype) -> None:
        self.library = library
        self.network = network
        self._dtype = data_type(library, dtype)
        self._float = library.DataType.FLOAT
        self._constants: list[np.ndarray] = []  # the network refers to their memory

    # Arithmetic

    def widen(self, x: Tensor) -> Tensor:
        """`x` in float32."""
        return x if x.dtype == self._float else self._output("cast", self.network.add_cast(x, self._float))

    def narrow(self, x: Tensor) -> Tensor:
        """`x` in the model's dtype."""
        return x if x.dtype == self._dtype else self._output("cast", self.network.add_cast(x, self._dtype))

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Elementwise; dimensions of 1 are repeated."""
        return self._elementwise(a, b, "PROD")

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Elementwise; dimensions of 1 are repeated."""
        return self._elementwise(a, b, "SUM")

    def scalar(self, value: float, rank: int) -> Tensor:
        """A float32 constant of `rank` dimensions of 1."""
        data = np.full((1,) * rank, value, dtype=np.float32)
        self._constants.append(data)
        return self._output("constant", self.network.add_constant(data.shape, self.library.Weights(data)))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias` with `weight` `[out, in]` and `bias` `[out]`."""
        operation = self.library.MatrixOperation
        matrix = self.reshape(weight, (1, *weight.shape))
        layer = self.network.add_matrix_multiply(x, operation.NONE, matrix, operation.TRANSPOSE)
        product = self._output("matrix multiply", layer)
        return product if bias is None else self.add(product, self.reshape(bias, (1, 1, *bias.shape)))

    # Shapes

    def reshape(self, x: Tensor, shape: tuple[int, ...], transpose: tuple[int, ...] | None = None) -> Tensor:
        """Reshape to `shape`, where 0 keeps a dimension; then put the dimensions in the order `transpose`."""
        layer = self.network.add_shuffle(x)
        output = self._output("shuffle", layer)
        layer.reshape_dims = shape
        if transpose is not None:
            layer.second_transpose = transpose
        return output

    def transpose(self, x: Tensor, order: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Put the dimensions in the order `order`, then reshape to `shape`, where 0 keeps a dimension."""
        layer = self.network.add_shuffle(x)
        output = self._output("shuffle", layer)
        layer.first_transpose = order
        layer.reshape_dims = shape
        return output

    def part(self, x: Tensor, axis: int, start: int, size: int) -> Tensor:
        """`size` entries of one dimension, from `start` on."""
        layer = self.network.add_slice(x, (start,), (size,), (1,))
        output = self._output("slice", layer)
        layer.axes = (axis,)
        return output

    def pick(self, x: Tensor, rows: Tensor) -> Tensor:
        """The rows with the indices `rows` `[batch, count]` of each sequence: `[batch, count, features]`."""
        layer = self.network.add_gather(x, rows, 1)
        output = self._output("gather", layer)
        layer.num_elementwise_dims = 1
        return output

    # Pieces of the model

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight` with `weight` `[features]`.

        Made of elementwise layers: the library's own normalization subtracts the mean.
        """
        operation = self.library.UnaryOperation
        wide = self.widen(x)
        square = self.multiply(wide, wide)
        average = self.network.add_reduce(square, self.library.ReduceOperation.AVG, 1 << 2, True)
        variance = self.add(self._output("reduce", average), self.scalar(eps, 3))
        deviation = self._output("unary", self.network.add_unary(variance, operation.SQRT))
        normed = self.multiply(wide, self._output("unary", self.network.add_unary(deviation, operation.RECIP)))
        scale = self.reshape(self.widen(weight), (1, 1, *weight.shape))
        return self.narrow(self.multiply(normed, scale))

    def rotate(self, heads: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotary embedding of `heads` `[batch, heads, rows, head_dim]` in float32. The halves of a head are the pairs.

        Args:
            positions: `[batch, rows]` int32.
            cosines, sines: `[positions, head_dim / 2]` float32.
        """
        layer = self.network.add_rotary_embedding(self.widen(heads), cosines, sines, False, 0)
        output = self._output("rotary embedding", layer)
        layer.set_input(3, positions)
        return output

    def store(self, cache: Tensor, rows: Tensor, first: Tensor) -> Tensor:
        """`cache` `[batch, kv_heads, max_rows, head_dim]` with `rows` `[batch, kv_heads, rows, head_dim]` stored in it.

        Args:
            first: `[batch]` int32, cache row of each sequence's first row.
        """
        layer = self.network.add_kv_cache_update(cache, rows, first, self.library.KVCacheMode.LINEAR)
        return self._output("KV cache update", layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, causal: bool) -> Tensor:
        """`[batch, heads, rows, head_dim]`: softmax(q k^T / sqrt(head_dim)) v over the first `lengths` keys.

        Args:
            q: `[batch, heads, rows, head_dim]`.
            k, v: `[batch, kv_heads, keys, head_dim]`; several heads of `q` share each.
            lengths: `[batch]` int32.
            causal: whether row i sees only the keys 0 to i.
        """
        library = self.library
        scaled = self.multiply(self.widen(q), self.scalar(1 / math.sqrt(q.shape[-1]), 4))
        mask = library.CausalMaskKind.UPPER_LEFT if causal else library.CausalMaskKind.NONE
        norm = library.AttentionNormalizationOp.SOFTMAX
        layer = self.network.add_attention_v2(self.narrow(scaled), k, v, norm, mask)
        output = self._output("attention", layer)
        layer.key_value_lengths = lengths
        return output

    def gated(self, gate_up: Tensor, size: int) -> Tensor:
        """`silu(gate) * up` of `gate_up` `[batch, rows, 2 * size]`, gate first."""
        gate = self.widen(self.part(gate_up, 2, 0, size))
        up = self.widen(self.part(gate_up, 2, size, size))
        layer = self.network.add_activation(gate, self.library.ActivationType.SIGMOID)
        silu = self.multiply(gate, self._output("activation", layer))
        return self.narrow(self.multiply(silu, up))

    def _elementwise(self, a: Tensor, b: Tensor, operation: str) -> Tensor:
        kind = getattr(self.library.ElementWiseOperation, operation)
        return self._output("elementwise", self.network.add_elementwise(a, b, kind))

    @staticmethod
    def _output(kind: str, layer: Any) -> Tensor:
        if layer is None:
            raise PlanError(f"TensorRT made no {kind} layer")
        return layer.get_output(0)
