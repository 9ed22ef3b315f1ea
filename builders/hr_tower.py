"""LLaVA-HR's vision tower: both paths and what joins them are in the checkpoint, and are never fetched."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.clip_config import clip_config
from dpn_rt.builders.json_values import Json, Section, object_of, value_of
from dpn_rt.builders.names import HR_ADAPTERS, HR_FAST, HR_SLOW, SUFFIXES, hr_modules
from dpn_rt.builders.shards import TensorInfo
from dpn_rt.builders.vision_tower import PublishedForm, VisionTower, clip_forms
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.model.vision.clip import names as clip
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.hr import names as hr
from dpn_rt.model.vision.hr.config import FastConfig, HrConfig, fast_image_size, size_problem
from dpn_rt.model.vision.hr.convnext_config import KERNEL, NUM_STAGES, STEM_STRIDE, ConvNextConfig
from dpn_rt.schema.bounds import bounded

PREFIX = "model.vision_tower."
TRUNK = "visual.trunk."
"""In open_clip's files all names of a ConvNeXt begin with it."""
_BLOCK = re.compile(r"stages\.(?P<stage>\d{1,6})\.blocks\.(?P<block>\d{1,6})\.")
_UNUSED = (
    rf"{re.escape(HR_SLOW)}(?:{re.escape(TRUNK)})?head\..*|"
    rf"{re.escape(HR_FAST)}(?:embeddings\.(?:class_embedding|position_ids)|post_layernorm\..*)|"
    r".*(?:inv_freq|position_ids)"
)
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The fast path of all published models, whose config.json does not describe it."""
FAMILIES = {
    "convnext_large": ConvNextConfig((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6),
    "convnext_xxlarge": ConvNextConfig((3, 4, 30, 3), (384, 768, 1536, 3072), 1e-5),
}
"""The slow paths of the published models."""


def is_hr(config: Json) -> bool:
    """Whether config.json describes a LLaVA-HR model."""
    return value_of(config, "is_multipath_encoder", bool, False)


def find_hr_tower(checkpoint: Checkpoint, config: Json, *, prepools: bool, note: Callable[[str], None]) -> VisionTower:
    """The tower of a LLaVA-HR checkpoint.

    Args:
        config: config.json.
        prepools: whether visual features are averaged before the projector.
        note: takes a line about weights that are left out.

    Raises:
        CheckpointError: a path is missing, or its sizes cannot be told.
        ConfigError: a value is missing or wrong, or the paths do not fit each other.
    """
    size = value_of(config, "input_image_size", int)
    problem = size_problem(size)
    if problem is not None:
        raise ConfigError(f"config.json: input_image_size: {problem}")
    is_frozen = value_of(config, "freeze_vision", bool, False)
    _check_paths(checkpoint)
    trunk = TRUNK if any(name.startswith(f"{PREFIX}{HR_SLOW}{TRUNK}") for name in checkpoint.tensors) else ""
    family = "convnext_xxlarge" if "xxlarge" in value_of(config, "vision_tower_slow", str) else "convnext_large"
    start = f"{PREFIX}{HR_SLOW}{trunk}"
    slow = {name.removeprefix(start): info for name, info in checkpoint.tensors.items() if name.startswith(start)}
    native = _fast_config(config)
    fast = replace(native, image_size=fast_image_size(size))
    vision = bounded(HrConfig(size, _slow_config(slow, family, start), fast, not is_frozen, prepools), "vision ")
    adapters = [name for name in checkpoint.tensors if name.startswith(f"{PREFIX}{HR_ADAPTERS}.")]
    if is_frozen and adapters:
        note(
            f"config.json: freeze_vision is true, so the model has no adapters: {len(adapters)} weights are left out, "
            f"such as {adapters[0]}"
        )
    is_gamma = any(name.endswith(".gamma") for name in slow)
    return VisionTower(
        checkpoint,
        PREFIX,
        vision,
        hr_modules(vision, PREFIX, trunk),
        hr_forms(vision, native),
        suffixes={hr.LAYER_SCALE: "gamma"} if is_gamma else SUFFIXES,
        unused=re.compile(_UNUSED + (rf"|{HR_ADAPTERS}\..*" if is_frozen else "")),
    )


def _check_paths(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that lacks a whole path."""
    missing = [
        f"{name} ({PREFIX}{start}*)"
        for name, start in (("slow path", HR_SLOW), ("fast path", HR_FAST))
        if not any(tensor.startswith(PREFIX + start) for tensor in checkpoint.tensors)
    ]
    if not missing:
        return
    has_decoder = any(name.startswith("model.layers.") for name in checkpoint.tensors)
    reason = "" if has_decoder else ", nor of a decoder: the result of stage-1 pretraining is a projector only"
    raise CheckpointError(
        f"{checkpoint.path}: no weights of the vision tower's {' and '.join(missing)}{reason}; expected a checkpoint "
        "that holds the whole model, towers included"
    )


def _fast_config(config: Json) -> FastConfig:
    """The fast path at the size that it was pretrained with; every layer runs, whatever the select layer is."""
    values = object_of(config, "vision_config")
    found = clip_config(Section(CLIP_L, "config.json: vision_config.") if values is None else values, -1, "patch")
    if found.image_size % found.patch_size or found.num_layers < 1:
        raise ConfigError(
            f"config.json: vision_config: image_size {found.image_size}, patch_size {found.patch_size} and "
            f"{found.num_layers} layers make no CLIP tower"
        )
    return FastConfig(**{name: getattr(found, name) for name in ClipConfig.__dataclass_fields__})


def _slow_config(weights: Mapping[str, TensorInfo], family: str, start: str) -> ConvNextConfig:
    """The slow path: sizes from shapes, the rest from its family.

    Args:
        weights: by their names without `start`.
    """
    blocks: dict[int, set[int]] = {stage: set() for stage in range(NUM_STAGES)}
    for name in weights:
        found = _BLOCK.match(name)
        if found:
            blocks.setdefault(int(found["stage"]), set()).add(int(found["block"]))
    absent = [f"{start}stages.{stage}.blocks.*" for stage, indices in sorted(blocks.items()) if not indices]
    if absent or len(blocks) != NUM_STAGES:
        found_stages = [stage for stage, indices in sorted(blocks.items()) if indices]
        raise CheckpointError(
            f"the slow vision tower has blocks in stages {found_stages}, expected stages 0 to {NUM_STAGES - 1}"
            + (f"; missing: {', '.join(absent)}" if absent else "")
        )
    depths = tuple(max(blocks[stage]) + 1 for stage in range(NUM_STAGES))
    dims = tuple(_channels(weights, stage, start) for stage in range(NUM_STAGES))
    _check_family(family, depths, dims)
    return ConvNextConfig(depths, dims, FAMILIES[family].layer_norm_eps)


def _channels(weights: Mapping[str, TensorInfo], stage: int, start: str) -> int:
    """Channels of a stage, from any weight that has as many elements as there are channels."""
    convolution = "stem.0" if stage == 0 else f"stages.{stage}.downsample.1"
    rows = [f"{convolution}.weight", f"{convolution}.bias"]
    inside = re.compile(rf"stages\.{stage}\.blocks\.\d+\.(?:conv_dw\.weight|conv_dw\.bias|norm\.\w+|weight|gamma)")
    for name in [*rows, *(name for name in weights if inside.fullmatch(name))]:
        if name in weights and weights[name].shape:
            return weights[name].shape[0]
    raise CheckpointError(f"{start}{rows[0]} is missing, and no other weight tells the channels of stage {stage}")


def _check_family(family: str, depths: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """Refuse a published network with other depths than it has, or under another's name."""
    for name, known in FAMILIES.items():
        if dims != known.dims:
            continue
        if name != family:
            raise ConfigError(
                f"config.json: vision_tower_slow names a {family}, but the weights have the channels {list(dims)} of "
                f"a {name}"
            )
        if depths != known.depths:
            raise CheckpointError(f"the slow vision tower has {list(depths)} blocks, a {name} has {list(known.depths)}")


def hr_forms(vision: HrConfig, native: ClipConfig) -> dict[str, PublishedForm]:
    """Convolutions and position embeddings."""
    forms = clip_forms(vision.fast)
    position_rows = 1 + native.num_patches
    positions = PublishedForm((position_rows, vision.hidden_size), "positions")
    forms[f"{clip.POSITION_EMBEDDING}.weight"] = positions
    channels = 3
    for stage, (depth, dim) in enumerate(zip(vision.slow.depths, vision.slow.dims, strict=True)):
        module, side = (hr.STEM, STEM_STRIDE) if stage == 0 else (hr.stage_module(stage, hr.DOWNSAMPLE), 2)
        forms[f"{module}.weight"] = PublishedForm((dim, channels, side, side), "pixels")
        for block in range(depth):
            forms[f"{hr.block_module(stage, block, hr.DEPTHWISE)}.weight"] = _depthwise_form(dim)
        channels = dim
    for adapter in range(vision.num_adapters):
        shapes = {
            hr.SLOW_CONV: (channels, channels, 1, 1),
            hr.SLOW_PROJ: (vision.hidden_size, channels, 1, 1),
            hr.FAST_PROJ: (vision.hidden_size, vision.hidden_size, 1, 1),
        }
        for part, shape in shapes.items():
            forms[f"{hr.adapter_module(adapter, part)}.weight"] = PublishedForm(shape, "rows")
        forms[f"{hr.adapter_module(adapter, hr.FAST_CONV)}.weight"] = _depthwise_form(vision.hidden_size)
    return forms


def _depthwise_form(channels: int) -> PublishedForm:
    return PublishedForm((channels, 1, KERNEL, KERNEL), "taps")
