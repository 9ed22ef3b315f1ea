"""Weights that come from a program instead of an engine directory."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dpn_rt.errors import EngineError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.weight_spec import differences, weight_spec
from dpn_rt.schema.text import few
from dpn_rt.schema.weights import WeightSpec


def collect_weights(model: ModelConfig, pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Canonical name -> tensor, checked against `weight_spec(model)`; the tensors are not copied.

    Args:
        model: the configuration.
        pairs: (canonical name, tensor) in any order, on any device.

    Raises:
        EngineError: weights are missing, unknown, given twice, or of the wrong shape or dtype.
    """
    weights, problems = dict[str, Tensor](), []
    for name, tensor in pairs:
        if name in weights:
            problems.append(f"{name} is given twice")
        elif not tensor.is_contiguous():
            problems.append(f"{name} has strides {list(tensor.stride())}, expected a contiguous tensor")
        weights[name] = tensor
    found = {name: WeightSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    problems = differences(weight_spec(model), found) + problems
    if problems:
        raise EngineError(f"weights do not fit the model: {few(problems, '; ')}")
    return weights
