"""One stage of the decoder in one phase, as a TensorRT network."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from dpn_rt.backends.tensorrt import tensors
from dpn_rt.backends.tensorrt.library import data_type
from dpn_rt.backends.tensorrt.tensors import StagePlan, cache_names
from dpn_rt.builders.tensorrt.layers import Graph, Tensor
from dpn_rt.model.decoder_weights import (
    DOWN,
    FINAL_NORM,
    GATE_UP,
    INPUT_NORM,
    O_PROJ,
    POST_NORM,
    QKV,
    layer_module,
)


def define_network(library: ModuleType, network: Any, plan: StagePlan) -> Graph:
    """Define a stage in an empty, strongly typed network.

    Returns:
        The graph, which owns the network's constants and must live until the plan is built.
    """
    graph = Graph(library, network, plan.dtype)
    inputs = {
        name: network.add_input(name, data_type(library, tensor.dtype), tensor.shape)
        for name, tensor in plan.inputs().items()
    }
    x = inputs[tensors.HIDDEN]
    for layer in plan.layers:
        x = _layer(graph, plan, layer, x, inputs)
    if plan.is_last:
        _mark(graph, _head(graph, plan, x, inputs), tensors.LOGITS)
    else:
        _mark(graph, x, tensors.HIDDEN_OUT)
    return graph


def _layer(graph: Graph, plan: StagePlan, layer: int, x: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    config = plan.model.decoder

    def linear(x: Tensor, part: str) -> Tensor:
        module = layer_module(layer, part)
        return graph.linear(x, inputs[f"{module}.weight"], inputs.get(f"{module}.bias"))

    def norm(x: Tensor, part: str) -> Tensor:
        return graph.rms_norm(x, inputs[f"{layer_module(layer, part)}.weight"], config.rms_norm_eps)

    attended = _attention(graph, plan, layer, linear(norm(x, INPUT_NORM), QKV), inputs)
    x = graph.add(x, linear(attended, O_PROJ))
    gated = graph.gated(linear(norm(x, POST_NORM), GATE_UP), config.intermediate_size)
    return graph.add(x, linear(gated, DOWN))


def _attention(graph: Graph, plan: StagePlan, layer: int, qkv: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """`qkv` `[batch, rows, qkv_size]` -> `[batch, rows, num_heads * head_dim]`; keys and values go to the caches."""
    config = plan.model.decoder
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    heads = graph.reshape(qkv, (0, 0, num_heads + 2 * num_kv_heads, config.head_dim), transpose=(0, 2, 1, 3))
    angles = inputs[tensors.POSITIONS], inputs[tensors.COSINES], inputs[tensors.SINES]
    q = graph.rotate(graph.part(heads, 1, 0, num_heads), *angles)
    k = graph.narrow(graph.rotate(graph.part(heads, 1, num_heads, num_kv_heads), *angles))
    v = graph.part(heads, 1, num_heads + num_kv_heads, num_kv_heads)
    stored = []
    for rows, cache in zip((k, v), cache_names(layer), strict=True):
        stored.append(graph.store(inputs[cache], rows, inputs[tensors.WRITE_ROWS]))
        _mark(graph, stored[-1], f"{cache}_out")
    # In a prefill the new rows see only each other; in a decode the one new row sees the whole cache.
    keys, values = (k, v) if plan.is_prefill else stored
    attended = graph.attend(q, keys, values, inputs[tensors.KV_LENGTHS], causal=plan.is_prefill)
    return graph.transpose(attended, (0, 2, 1, 3), (0, 0, num_heads * config.head_dim))


def _head(graph: Graph, plan: StagePlan, x: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits `[batch, vocab_size]` of each sequence's last row."""
    config = plan.model.decoder
    if plan.is_prefill:
        x = graph.pick(x, inputs[tensors.LAST_ROWS])
    normed = graph.rms_norm(x, inputs[f"{FINAL_NORM}.weight"], config.rms_norm_eps)
    return graph.reshape(graph.linear(normed, inputs[plan.head], None), (0, config.vocab_size))


def _mark(graph: Graph, tensor: Tensor, name: str) -> None:
    tensor.name = name
    graph.network.mark_output(tensor)
