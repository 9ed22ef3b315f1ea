"""Canonical weights -> the tensors of an engine, some of them quantised; and which form an engine takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.layout import Note
from dpn_rt.builders.quantized.checkpoint import QuantizedCheckpoint
from dpn_rt.builders.weight_stream import WeightStream
from dpn_rt.model.weights.forms import DENSE_SUFFIX, quantized_form, stored_specs
from dpn_rt.model.weights.weight import QuantizedWeight
from dpn_rt.schema.dtypes import DType, Quantize
from dpn_rt.schema.weights import WeightSpec


class CanonicalWeights(Protocol):
    """Where the weights of an engine come from."""

    def read(self, name: str) -> Tensor:
        """One canonical weight."""

    def published_scale(self, name: str, form: type[QuantizedWeight]) -> Tensor | None:
        """The scales that a weight is published with; None where there are none that fit `form`."""


def stored_tensors(
    names: Mapping[str, WeightSpec],
    canonical: Mapping[str, WeightSpec],
    quantize: Quantize,
    stream: CanonicalWeights,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an engine in the order of its file.

    One weight is in memory at a time, and the scales of those whose place in the file comes later.

    Args:
        names: the engine's tensors, in the order of the file.
        canonical: the weights that they are made of.
        quantize: of the engine.
        stream: of the canonical weights, each of which is read once.
    """
    owners = {stored: name for name, spec in canonical.items() for stored in stored_specs(name, spec, quantize)}
    ready: dict[str, Tensor] = {}
    for stored in names:
        name = owners[stored]
        if stored not in ready:
            form, weight = quantized_form(canonical[name], quantize), stream.read(name)
            if form is None:
                ready[stored] = weight
            else:
                module = name.removesuffix(DENSE_SUFFIX)
                parts = form.quantize(weight, stream.published_scale(name, form))
                ready |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
            del weight
        yield stored, ready.pop(stored)


def choose_quantize(
    asked: Quantize | None, checkpoint: Checkpoint, dtype: DType, has_plans: bool, note: Note
) -> Quantize:
    """The form of an engine: as asked, or int8 for a W8A8 checkpoint where int8 can run, or else none.

    Args:
        dtype: of the engine; float16 has no quantised weights.
        has_plans: of TensorRT, which have no quantised weights.
        note: takes lines about what a quantised checkpoint becomes.
    """
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return asked or "none"
    if not checkpoint.matrices:
        note(f"{checkpoint.form.name}: none of the checkpoint's weights is quantised")
        return asked or "none"
    if checkpoint.unused:
        note(f"{_some(checkpoint.unused)} left out: rows, keys and values are not rounded by fixed scales")
    for key in checkpoint.form.left_out:
        note(f"config.json: {key} is left out: keys and values are in {dtype}")
    can_run = dtype != "float16" and not has_plans
    chosen = asked or ("int8" if checkpoint.is_w8a8 and can_run else "none")
    published = f"{len(checkpoint.matrices)} weights are published in {checkpoint.kinds} ({checkpoint.form.name})"
    if chosen == "none":
        kept = "fp8 takes them over, for GPUs" if checkpoint.kinds == "fp8" else "int8 or int4 keeps them small"
        advice = f"; --quantize {kept}" if asked is None and can_run else ""
        note(f"{published}, the engine has them in {dtype}{advice}")
    elif asked is None:
        note(f"{published} for rows that are rounded to 8 bits, so the engine is int8 (--quantize none: {dtype})")
    return chosen


def note_rounded_again(stream: WeightStream, quantize: Quantize, note: Note) -> None:
    """One line about the published weights whose integers an engine could not take over."""
    if stream.rounded_again:
        note(
            f"{len(stream.rounded_again)} quantised weights have other numbers, groups or zero points than {quantize} "
            f"engines, and were rounded again: {_some(stream.rounded_again)}"
        )


def _some(names: Sequence[str]) -> str:
    """The first of some names, and how many others there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
