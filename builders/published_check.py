"""Compares a checkpoint's weights with those that its configuration needs."""

from __future__ import annotations

from collections.abc import Mapping

from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.layout import Layout, Note
from dpn_rt.builders.names import LLAMA_ROOTS, ROUTER
from dpn_rt.builders.quantized.checkpoint import matrix_of
from dpn_rt.builders.vision_tower import VisionTower
from dpn_rt.builders.weight_sources import Part, WeightSource
from dpn_rt.errors import CheckpointError
from dpn_rt.schema.text import few

_FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_published(checkpoint: Checkpoint, layout: Layout, sources: Mapping[str, WeightSource], note: Note) -> None:
    """Refuse a checkpoint whose weights are not those that `sources` need.

    Raises:
        CheckpointError: names every weight that is missing, has the wrong shape or no float dtype, or has no place in
            the configuration.
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
            + "; ".join(f"{kind}: {few(names)}" for kind, names in problems.items() if names)
        )
    if ignored:
        note(f"{len(ignored)} weights are not part of the model and are left out: {few(ignored)}")


def _mismatch(part: Part) -> str | None:
    info = part.checkpoint.tensors.get(part.name)
    if info is None or (info.shape == part.shape and info.dtype in _FLOAT_DTYPES):
        return None
    if info.shape != part.shape:
        return f"{part.name} (expected {list(part.shape)}, got {list(info.shape)})"
    return f"{part.name} (expected a float dtype, got {info.dtype})"


def _unused(checkpoint: Checkpoint, layout: Layout, used: set[str]) -> tuple[list[str], list[str]]:
    """Two lists of unused weights: those that show that the configuration is wrong, and those of other models.

    Some unused weights are normal and in neither list: rotary frequencies, parts of the vision tower that do not run,
    an output layer that is tied to the embedding, routers of a model with static or random pooling, and biases of
    quantised layers that are 0.
    """
    model_weight = (*(f"{layout.names.decoder}{root}." for root in LLAMA_ROOTS), layout.names.projector_prefix)
    if layout.tower is not None and layout.tower.prefix:
        model_weight += (layout.tower.prefix,)
    head = f"{layout.names.lm_head}.weight"
    unexpected, ignored = [], []
    for name in checkpoint.tensors:
        harmless = (
            name in used
            or name.endswith("rotary_emb.inv_freq")
            or _is_unused_in_tower(layout.tower, name)
            or (layout.decoder.tie_word_embeddings and name == head)
            or (f".{ROUTER}." in name and layout.reduction.layers and not layout.reduction.reads_router_rows)
            or _is_zero_bias(checkpoint, name)
        )
        if harmless:
            continue
        if name.startswith(model_weight) or name == head:
            unexpected.append(name)
        else:
            ignored.append(name)
    return unexpected, ignored


def _is_unused_in_tower(tower: VisionTower | None, name: str) -> bool:
    if tower is None or not tower.prefix or not name.startswith(tower.prefix):
        return False
    return tower.unused.fullmatch(name.removeprefix(tower.prefix)) is not None


def _is_zero_bias(checkpoint: Checkpoint, name: str) -> bool:
    """GPTQ's older writers give every quantised layer a bias."""
    layer, _, suffix = name.rpartition(".")
    return suffix == "bias" and matrix_of(checkpoint, f"{layer}.weight") is not None and not checkpoint.read(name).any()
