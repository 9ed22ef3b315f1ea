"""Reads published weights one at a time and assembles them to canonical ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dpn_rt.builders.arrangement import arranged
from dpn_rt.builders.quantized.checkpoint import matrix_of
from dpn_rt.builders.weight_sources import WeightSource
from dpn_rt.device.huge_pages import huge_memory
from dpn_rt.errors import CheckpointError
from dpn_rt.format.weight_file import tensor_bytes
from dpn_rt.model.weights.weight import QuantizedWeight
from dpn_rt.schema.weights import WeightSpec


class WeightStream:
    """The canonical weights, one at a time, and a fingerprint of the published weights that they are made of.

    One canonical weight and one published tensor are in memory at a time.
    """

    def __init__(self, config: bytes, sources: Mapping[str, WeightSource], spec: Mapping[str, WeightSpec]) -> None:
        """
        Args:
            config: the checkpoint's config.json; part of the fingerprint.
            sources: of every weight in `spec`.
            spec: of the engine, in the order of the file.
        """
        self._sources = sources
        self._spec = spec
        self._digest = hashlib.sha256(config)
        self.rounded_again: list[str] = []
        """Published names of quantised weights that `published_scale` could not take over."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._spec:
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """One canonical weight.

        Raises:
            CheckpointError: the weight has infinite values or NaN, or values out of range of its dtype.
        """
        return self._assemble(name, self._sources[name], self._spec[name])

    def published_scale(self, name: str, form: type[QuantizedWeight]) -> Tensor | None:
        """The scales with which `form` takes over a canonical weight as it is published, integer by integer.

        None where the form has another grid, or where a part of the weight is not quantised.

        Raises:
            CheckpointError: a scale is infinite or NaN.
        """
        parts = self._sources[name].parts
        matrices = {part.name: found for part in parts if (found := matrix_of(part.checkpoint, part.name))}
        scales = [each.scale_for(form) for each in matrices.values()]
        known = [scale for scale in scales if scale is not None]
        if parts and len(known) == len(parts):
            return torch.cat(known)
        self.rounded_again += matrices
        return None

    def fingerprint(self) -> str:
        """sha256 of the configuration and of the weights read so far. It does not depend on the shards."""
        return self._digest.hexdigest()

    def _assemble(self, name: str, source: WeightSource, spec: WeightSpec) -> Tensor:
        """One canonical weight, in the spec's shape and dtype.

        Raises:
            CheckpointError: the weight has infinite values or NaN, or values out of range of its dtype.
        """
        # The system has it back as soon as the weight is dropped, where an allocator keeps some, now more, now less.
        weight = huge_memory(spec.num_bytes).view(spec.dtype).view(spec.shape)
        if not source.parts:
            weight.zero_()
        row = 0
        for part in source.parts:
            tensor = part.checkpoint.read(part.name)
            self._digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            self._digest.update(tensor_bytes(tensor))
            tensor = arranged(tensor, source.arrangement, spec.shape)
            weight[row : row + tensor.shape[0]].copy_(tensor)
            row += tensor.shape[0]
        if not _is_finite(weight):
            self._fail(source, spec)
        return weight

    def _fail(self, source: WeightSource, spec: WeightSpec) -> None:
        tensors = {part.name: part.checkpoint.read(part.name) for part in source.parts}
        broken = [published for published, tensor in tensors.items() if not _is_finite(tensor)]
        if broken:
            raise CheckpointError(f"{', '.join(broken)}: holds infinite values or NaN")
        largest = max(float(tensor.abs().max()) for tensor in tensors.values())
        dtype = str(spec.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{', '.join(tensors)}: values up to {largest:.4g} do not fit {dtype}: choose another --dtype"
        )


def _is_finite(weight: Tensor) -> bool:
    """Whether no value is infinite or NaN; `aminmax` reads the tensor once, without a copy, and propagates NaN."""
    return all(bool(extreme.isfinite()) for extreme in weight.aminmax())
