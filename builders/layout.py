"""The result of reading a layout: a checkpoint's model, and the published names of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.json_values import Json
from dpn_rt.builders.names import LLAMA, LayoutNames
from dpn_rt.builders.shards import TensorInfo
from dpn_rt.builders.vision_tower import VisionTower
from dpn_rt.format.config import AspectRatio, ReductionConfig
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.decoder_weights import EMBED_TOKENS
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


def has_own_head(checkpoint: Checkpoint, names: LayoutNames, is_tied: bool, note: Note) -> bool:
    """Whether the checkpoint has an output layer that is not the embedding.

    Args:
        is_tied: what config.json says. A copy of the embedding may be saved all the same. Where the saved one has other
            numbers, it was trained by itself and the flag is wrong: it counts, as in transformers 5.
        note: takes a line about that.
    """
    head, embedding = f"{names.lm_head}.weight", f"{names.decoder}{LLAMA[EMBED_TOKENS][0]}.weight"
    if head not in checkpoint.tensors:
        return False
    if not is_tied or embedding not in checkpoint.tensors:
        return not is_tied
    is_alike = checkpoint.tensors[head] == checkpoint.tensors[embedding]  # else nothing is read
    if is_alike and torch.equal(checkpoint.read(head), checkpoint.read(embedding)):
        return False
    note(f"{head} is not the embedding, though config.json has tie_word_embeddings: it is used")
    return True


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
