"""Check the published weights against what the model needs, then stream them into canonical weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.layout import Layout, Note
from dpn_rt.builders.name_map import Part, WeightSource
from dpn_rt.errors import CheckpointError
from dpn_rt.format.engine_dir import tensor_bytes
from dpn_rt.schema.weights import WeightSpec

_FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_published(checkpoint: Checkpoint, layout: Layout, sources: Mapping[str, WeightSource], note: Note) -> None:
    """Compare the weights that are there with those that `sources` need.

    Raises:
        CheckpointError: one message with every weight that is missing, mis-shaped, of a dtype that is not a float,
            or present although the configuration has no place for it.
    """
    parts = [part for source in sources.values() for part in source.parts]
    problems = {"missing": [part.name for part in parts if part.name not in part.checkpoint.tensors]}
    problems["wrong shape or dtype"] = [text for part in parts if (text := _mismatch(part))]
    used = {part.name for part in parts if part.checkpoint is checkpoint}
    unexpected, ignored = _unused(checkpoint, layout, used)
    problems["unexpected (config.json has no place for them)"] = unexpected
    if any(problems.values()):
        raise CheckpointError(
            f"{checkpoint.path}: the weights do not match config.json: "
            + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        )
    if ignored:
        note(f"{len(ignored)} weights are not part of the model and are left out: {', '.join(ignored)}")


def _mismatch(part: Part) -> str | None:
    info = part.checkpoint.tensors.get(part.name)
    if info is None or (info.shape == part.shape and info.dtype in _FLOAT_DTYPES):
        return None
    if info.shape != part.shape:
        return f"{part.name} (expected {list(part.shape)}, got {list(info.shape)})"
    return f"{part.name} (expected a float dtype, got {info.dtype})"


def _unused(checkpoint: Checkpoint, layout: Layout, used: set[str]) -> tuple[list[str], list[str]]:
    """Unused weights: those that show that the configuration is wrong, and those that are none of ours.

    Neither holds what an unchanged checkpoint may well bring along: rotary frequencies, parts of the vision tower that
    do not run, a head that is tied, and routers of a model whose pooling is set to be static or random.
    """
    model_weight = re.compile(re.escape(layout.names.decoder) + r"(embed_tokens|layers|norm)\.")
    unexpected, ignored = [], []
    for name in checkpoint.tensors:
        harmless = (
            name in used
            or name.endswith("rotary_emb.inv_freq")
            or (layout.tower is not None and name.startswith(layout.tower.prefix) and layout.tower.prefix != "")
            or (layout.decoder.tie_word_embeddings and name == layout.names.lm_head)
            or (".pooling_router." in name and layout.reduction.layers and not layout.reduction.reads_router_rows)
        )
        if harmless:
            continue
        if model_weight.match(name) or name.startswith(layout.names.projector_prefix) or name == layout.names.lm_head:
            unexpected.append(name)
        else:
            ignored.append(name)
    return unexpected, ignored


class WeightStream:
    """The canonical weights one after another, and the fingerprint of what they were made from.

    At any moment one canonical weight and one published tensor are in memory.
    """

    def __init__(self, config: bytes, sources: Mapping[str, WeightSource], spec: Mapping[str, WeightSpec]) -> None:
        """`config` (the checkpoint's config.json) is part of the fingerprint."""
        self._sources = sources
        self._spec = spec
        self._digest = hashlib.sha256(config)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, spec in self._spec.items():
            yield name, self._assemble(name, self._sources[name], spec)

    def fingerprint(self) -> str:
        """sha256 of the configuration and of the weights read so far; how they were sharded does not matter."""
        return self._digest.hexdigest()

    def _assemble(self, name: str, source: WeightSource, spec: WeightSpec) -> Tensor:
        """One canonical weight, in the spec's shape and dtype.

        Raises:
            CheckpointError: it holds infinite values or NaN, or values that its dtype cannot hold.
        """
        weight = (torch.empty if source.parts else torch.zeros)(spec.shape, dtype=spec.dtype)
        row = 0
        for part in source.parts:
            tensor = part.checkpoint.read(part.name)
            self._digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            self._digest.update(tensor_bytes(tensor))
            if source.assembly == "taps":
                tensor = tensor.flatten(1).t()  # [H, 1, kh, kw] -> [kh * kw, H]
            elif len(spec.shape) == 2:
                tensor = tensor.flatten(1)
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
    """Whether no value is infinite or NaN; `aminmax` reads the tensor once, copies nothing and hands NaN on."""
    return all(bool(extreme.isfinite()) for extreme in weight.aminmax())
