"""The small random engines, quantised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dpn_rt.builders.quantize import stored_tensors
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineSource, write_engine
from dpn_rt.format.weight_spec import canonical_specs, weight_spec
from tests.engine.models import random_weights


class Canonical:
    """Random weights, none of them published quantised."""

    def __init__(self, model: ModelConfig) -> None:
        self._weights = dict(random_weights(replace(model, quantize="none")))

    def read(self, name: str) -> Tensor:
        return self._weights[name]

    def published_scale(self, *_: object) -> None:
        return None


def quantized_weights(model: ModelConfig) -> list[tuple[str, Tensor]]:
    return list(stored_tensors(weight_spec(model), canonical_specs(model), model.quantize, Canonical(model)))


def write_quantized_engine(path: Path, model: ModelConfig) -> Path:
    write_engine(path, model, EngineSource("0" * 64, "original"), quantized_weights(model), {}, force=False)
    return path
