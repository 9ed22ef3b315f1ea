"""The list of an engine's weights: canonical name, shape and dtype of each, in the order of the file.

Builders write exactly the weights of this list, and the runtime reads exactly those. Each part of a model names its own
weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dpn_rt.format.config import ModelConfig
from dpn_rt.model.decoder_weights import decoder_specs
from dpn_rt.model.weights.forms import stored_specs
from dpn_rt.schema.weights import TORCH_DTYPES, WeightSpec

TENSOR_ALIGNMENT = 64
"""Bytes. One cache line, which is also the widest vector that a kernel loads."""


def weight_spec(model: ModelConfig) -> dict[str, WeightSpec]:
    """Every tensor of an engine of `model`, by canonical name, in the order of the file.

    The format allows no gaps between tensors, so the order of tensors must align them. The tensors whose size is a
    multiple of 64 bytes come first; in real models these are nearly all. The others follow, sorted by the largest power
    of two that divides their size. So a tensor starts at a multiple of 64 bytes, or at least of the largest power of
    two that divides its own size.
    """
    named = [
        stored
        for name, spec in canonical_specs(model).items()
        for stored in stored_specs(name, spec, model.quantize).items()
    ]
    named.sort(key=lambda item: -_size_alignment(item[1].num_bytes))  # stable: equal alignment keeps the model's order
    return dict(named)


def canonical_specs(model: ModelConfig) -> dict[str, WeightSpec]:
    """Every weight as a model in `model.dtype` has it, in the model's order; engines may store it in another form."""
    dtype = TORCH_DTYPES[model.dtype]
    hidden_size = model.decoder.hidden_size
    named = [*decoder_specs(model.decoder, dtype), *model.reduction.weight_specs(hidden_size, dtype)]
    if model.projector is not None:
        named += model.projector.weight_specs(hidden_size, dtype)
    if model.vision is not None:
        named += model.vision.weight_specs(dtype)
    return dict(named)


def differences(expected: Mapping[str, WeightSpec], found: Mapping[str, WeightSpec]) -> list[str]:
    """How weights differ from what is expected, one line each: missing, unexpected, or of another shape or dtype."""
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is unexpected" for name in found if name not in expected]
    return lines + [
        f"{name}: expected {describe(weight)}, got {describe(found[name])}"
        for name, weight in expected.items()
        if name in found and found[name] != weight
    ]


def describe(weight: WeightSpec) -> str:
    """Shape and dtype for an error message, such as `[2, 3] float32`."""
    return f"{list(weight.shape)} {str(weight.dtype).removeprefix('torch.')}"


def _size_alignment(num_bytes: int) -> int:
    return math.gcd(num_bytes, TENSOR_ALIGNMENT)
