"""Weights that come from a program instead of an engine directory."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dpn_rt.errors import EngineError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.schema.text import few


def collect_weights(model: ModelConfig, pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Canonical name -> tensor, checked against `weight_spec(model)`; the tensors are not copied.

    Args:
        model: the configuration.
        pairs: (canonical name, tensor) in any order, on any device.

    Raises:
        EngineError: weights are missing, unknown, given twice, or of the wrong shape or dtype.
    """
    spec, weights, problems = weight_spec(model), dict[str, Tensor](), []
    for name, tensor in pairs:
        wanted = spec.get(name)
        if wanted is None:
            problems.append(f"{name} is not a weight of this model")
        elif name in weights:
            problems.append(f"{name} is given twice")
        elif (tuple(tensor.shape), tensor.dtype) != (wanted.shape, wanted.dtype):
            found = f"{list(tensor.shape)} {tensor.dtype}"
            problems.append(f"{name} is {found}, expected {list(wanted.shape)} {wanted.dtype}")
        elif not tensor.is_contiguous():
            problems.append(f"{name} has strides {list(tensor.stride())}, expected a contiguous tensor")
        weights[name] = tensor
    problems += [f"{name} is missing" for name in spec if name not in weights]
    if problems:
        raise EngineError(f"weights do not fit the model: {few(problems, '; ')}")
    return weights
