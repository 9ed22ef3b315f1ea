"""The result of reading a layout: a checkpoint's model, and the published names of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from dpn_rt.builders.json_values import Json
from dpn_rt.builders.names import LayoutNames
from dpn_rt.builders.shards import TensorInfo
from dpn_rt.builders.vision_tower import VisionTower
from dpn_rt.format.config import AspectRatio, ReductionConfig
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.projector import ProjectorConfig, ProjectorType

Note = Callable[[str], None]
"""Is called with one line for the user: an assumption that was made, or something that the engine lacks."""

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """A checkpoint's model and names, in the same form for every layout."""

    kind: Literal["original", "huggingface"]
    names: LayoutNames
    decoder: DecoderConfig
    reduction: ReductionConfig
    tower: VisionTower | None
    projector: ProjectorConfig | None
    image_aspect_ratio: AspectRatio
    token_values: tuple[Json, ...]
    """The parts of config.json with ids that start and end a sequence, the decoder's own last."""
    token_defaults: Json
    """Ids that transformers takes where no file names one."""
    has_own_template: bool
    """Whether conversations are written by the tokenizer's chat template, where it has one; if not, as Vicuna's."""
    image_token_id: int | None
    router_token_id: int | None


def projector_config(
    kind: ProjectorType, names: LayoutNames, tensors: Mapping[str, TensorInfo], tower: VisionTower | None
) -> ProjectorConfig | None:
    """The projector of a checkpoint; None without a vision tower and without weights of a projector."""
    if tower is not None:
        return ProjectorConfig(kind, tower.config.hidden_size, has_newline=isinstance(tower.config, AnyresConfig))
    if not any(name.startswith(names.projector_prefix) for name in tensors):
        return None
    first = tensors.get(f"{names.projector[0]}.weight")
    return ProjectorConfig(kind, first.shape[1] if first is not None and len(first.shape) == 2 else 1)


def most_common_prefix(tensors: Mapping[str, TensorInfo], prefixes: tuple[str, ...], parts: tuple[str, ...]) -> str:
    """The prefix under which most of `parts` are found; the first prefix where none is."""

    def count(prefix: str) -> int:
        starts = tuple(prefix + part for part in parts)
        return sum(name.startswith(starts) for name in tensors)

    return max(prefixes, key=count)
