"""Executes a TensorRT network with torch, layer by layer, by the documented meaning of each layer.

Floating-point tensors are float32 here, for any dtype in the network. A layer, mode or option that is not listed here
is refused, so no layer of an evaluated network is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpn_rt.backends.tensorrt.library import Log, torch_dtype
from dpn_rt.backends.tensorrt.tensors import StagePlan
from dpn_rt.builders.tensorrt.network import define_network
from dpn_rt.builders.tensorrt.plans import create_network


class UnknownLayerError(Exception):
    """The evaluator does not know a layer, or one of its options."""


@dataclass
class Evaluator:
    """One network."""

    library: ModuleType
    network: Any

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. Caches among the inputs are written in place, as in the library."""
        declared = [self.network.get_input(i) for i in range(self.network.num_inputs)]
        values: dict[str, Tensor] = {}
        for tensor in declared:
            value = inputs[tensor.name]
            expected = torch_dtype(tensor.dtype)
            shape = tuple(tensor.shape)
            assert value.dtype == expected or expected.is_floating_point == value.dtype.is_floating_point, tensor.name
            assert value.ndim == len(shape), f"{tensor.name}: {tuple(value.shape)} for {shape}"
            assert all(b in (-1, a) for a, b in zip(value.shape, shape, strict=True)), f"{tensor.name}: {value.shape}"
            values[tensor.name] = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        for index in range(self.network.num_layers):
            self._run_layer(self.network.get_layer(index), values)
        outputs = [self.network.get_output(i).name for i in range(self.network.num_outputs)]
        return {name: values[name] for name in outputs}

    def _run_layer(self, layer: Any, values: dict[str, Tensor]) -> None:
        kind = layer.type.name
        if kind not in LAYERS:
            raise UnknownLayerError(f"{kind} ({layer.name})")
        class_name, evaluate = LAYERS[kind]
        layer.__class__ = getattr(self.library, class_name)
        source = [layer.get_input(i) for i in range(layer.num_inputs)]
        result = evaluate(layer, [None if tensor is None else values[tensor.name] for tensor in source], values)
        assert layer.num_outputs == 1, layer.name
        values[layer.get_output(0).name] = result


Values = dict[str, Tensor]


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise UnknownLayerError(what)


def _shuffle(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    (x,) = inputs
    _require(layer.zero_is_placeholder, "shuffle: zero is a size")
    x = x.permute(tuple(layer.first_transpose)[: x.ndim])
    shape = [x.shape[i] if size == 0 else size for i, size in enumerate(layer.reshape_dims)]
    x = x.reshape(shape)
    return x.permute(tuple(layer.second_transpose)[: x.ndim])


def _slice(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    _require(layer.mode.name == "STRICT_BOUNDS" and len(inputs) == 1, f"slice: mode {layer.mode.name}")
    x = inputs[0]
    for axis, start, size, stride in zip(layer.axes, layer.start, layer.shape, layer.stride, strict=True):
        _require(stride == 1, f"slice: stride {stride}")
        assert start + size <= x.shape[axis]
        x = x.narrow(axis, start, size)
    return x


def _cast(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    _require(torch_dtype(layer.to_type).is_floating_point and inputs[0].is_floating_point(), "cast of whole numbers")
    return inputs[0]


def _constant(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    return torch.from_numpy(layer.weights.copy()).reshape(tuple(layer.shape))


def _elementwise(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    operations = {"PROD": torch.mul, "SUM": torch.add}
    _require(layer.op.name in operations, f"elementwise: {layer.op.name}")
    a, b = inputs
    assert a.ndim == b.ndim, "elementwise: ranks differ"
    return operations[layer.op.name](a, b)


def _unary(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    operations = {"SQRT": torch.sqrt, "RECIP": torch.reciprocal}
    _require(layer.op.name in operations, f"unary: {layer.op.name}")
    return operations[layer.op.name](inputs[0])


def _reduce(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    _require(layer.op.name == "AVG", f"reduce: {layer.op.name}")
    axes = [axis for axis in range(inputs[0].ndim) if layer.axes >> axis & 1]
    return inputs[0].mean(axes, keepdim=layer.keep_dims)


def _activation(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    _require(layer.type.name == "SIGMOID", f"activation: {layer.type.name}")
    return torch.sigmoid(inputs[0])


def _matrix_multiply(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    operands = []
    for x, operation in zip(inputs, (layer.op0, layer.op1), strict=True):
        _require(operation.name in ("NONE", "TRANSPOSE"), f"matrix multiply: {operation.name}")
        operands.append(x.transpose(-1, -2) if operation.name == "TRANSPOSE" else x)
    assert operands[0].ndim == operands[1].ndim, "matrix multiply: ranks differ"
    return torch.matmul(*operands)


def _gather(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    _require(layer.mode.name == "DEFAULT" and layer.num_elementwise_dims == 1 and layer.axis == 1, "gather: options")
    x, indices = inputs
    return torch.stack([row.index_select(0, index) for row, index in zip(x, indices, strict=True)])


def _rotary(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    """Pairs elements of a head's two halves, or with `interleaved` adjacent elements."""
    _require(layer.rotary_embedding_dim == 0 and len(inputs) == 4, "rotary embedding: part of a head, or no positions")
    x, cosines, sines, positions = inputs
    cos, sin = cosines[positions.long()].unsqueeze(1), sines[positions.long()].unsqueeze(1)  # [B, 1, S, D / 2]
    if layer.interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _kv_cache_update(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    """Rows after the end of the cache are dropped without an error."""
    _require(layer.cache_mode.name == "LINEAR" and layer.update_form.name == "PADDED_BHND", "KV cache update: options")
    cache, update, first = inputs
    for sequence, start in enumerate(first.tolist()):
        room = max(0, min(update.shape[2], cache.shape[2] - start))
        cache[sequence, :, start : start + room] = update[sequence, :, :room]
    return cache


def _attention_input(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    """Computes the attention at its output layer, from the inputs of that layer."""
    return inputs[0]


def _attention_output(layer: Any, inputs: list[Tensor], values: Values) -> Tensor:
    attention = layer.attention
    forms = {attention.query_form.name, attention.key_value_form.name}
    _require(forms == {"PADDED_BHND"} and attention.norm_op.name == "SOFTMAX", "attention: layout or norm")
    _require(attention.mask is None, "attention: mask")
    q, k, v = (values[attention.get_input(i).name] for i in range(3))
    lengths = values[attention.key_value_lengths.name]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    rows = torch.arange(q.shape[2])[:, None]
    keys = torch.arange(k.shape[2])[None, :]
    kind = attention.causal_kind.name
    _require(kind in ("NONE", "UPPER_LEFT"), f"attention: causal kind {kind}")
    seen = keys <= rows if kind == "UPPER_LEFT" else torch.ones_like(keys <= rows)
    seen = seen[None, None] & (keys[None, None] < lengths[:, None, None, None])
    scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, float("-inf"))
    v = v.masked_fill(~seen.any(-2, keepdim=True).transpose(-1, -2), 0)  # rows that no row sees may hold anything
    return torch.softmax(scores, -1) @ v


Evaluate = Callable[[Any, list[Tensor], Values], Tensor]
LAYERS: dict[str, tuple[str, Evaluate]] = {
    "ACTIVATION": ("IActivationLayer", _activation),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention_input),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _attention_output),
    "CAST": ("ICastLayer", _cast),
    "CONSTANT": ("IConstantLayer", _constant),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "GATHER": ("IGatherLayer", _gather),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _kv_cache_update),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matrix_multiply),
    "REDUCE": ("IReduceLayer", _reduce),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", _rotary),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "UNARY": ("IUnaryLayer", _unary),
}


@dataclass
class StageNetwork:
    """A stage's network, and the objects that must live as long as it."""

    network: Any
    owners: tuple[Any, ...]


def stage_network(library: ModuleType, plan: StagePlan) -> StageNetwork:
    """The network of a stage as the builder defines it, without building a plan."""
    log = Log(library)
    builder = library.Builder(log.logger)
    network = create_network(library, builder)
    graph = define_network(library, network, plan)
    return StageNetwork(network, (log, builder, graph))
