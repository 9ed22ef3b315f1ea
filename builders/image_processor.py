"""The image processor's file that an engine carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpn_rt.builders.json_values import Json, json_bytes, read_json, read_json_if_there
from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.preprocessing import load_image_processor
from dpn_rt.model.vision.siglip.config import SiglipConfig
from dpn_rt.schema.files import is_there
from dpn_rt.schema.text import shown

_IMAGE_PROCESSOR = "preprocessor_config.json"
_TYPE = "image_processor_type"
_CLIP_TYPE = "CLIPImageProcessor"
_PINPOINTS = "image_grid_pinpoints"
_TILED_TYPES = {"tiled": "LlavaNextImageProcessor", "whole": "LlavaOnevisionImageProcessor"}

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_SIGLIP_MEAN_AND_STD = (0.5, 0.5, 0.5)


def image_processor_file(path: Path, tower_path: Path | None, vision: ClipConfig | AnyresConfig) -> dict[str, bytes]:
    """Its name and content: the checkpoint's, else the vision tower's, else the settings of its kind of tower.

    Raises:
        ConfigError: it makes images of another size than the tower takes, or other tiles than config.json says.
    """
    tower = vision.tower if isinstance(vision, AnyresConfig) else vision
    settings = _settings(path, tower_path, tower)
    return {_IMAGE_PROCESSOR: json_bytes(_in_tiles(settings, vision) if isinstance(vision, AnyresConfig) else settings)}


def _settings(path: Path, tower_path: Path | None, tower: ClipConfig) -> Json:
    for directory in (path, tower_path):
        settings = None if directory is None else _read_image_processor(directory)
        if directory is not None and settings is not None:
            _check_image_size(settings, tower.image_size)
            return _with_type(settings, directory)
    return _default_settings(tower)


def _in_tiles(settings: Json, vision: AnyresConfig) -> Json:
    """The settings with the class that makes tiles, and the tilings that the model takes."""
    resolutions = [list(each) for each in vision.resolutions]
    given = settings.get(_PINPOINTS)
    if given is not None and given != resolutions:
        raise ConfigError(
            f"{_IMAGE_PROCESSOR}: {_PINPOINTS} is {shown(given)}, but config.json has {shown(resolutions)}"
        )
    return {**settings, _TYPE: _TILED_TYPES[vision.several_images], _PINPOINTS: resolutions}


def _read_image_processor(directory: Path) -> Json | None:
    # transformers 5 keeps it inside the processor's file, and reads that first: a file beside it is an older one
    nested = read_json_if_there(directory / "processor_config.json").get("image_processor")
    if isinstance(nested, dict):
        return nested
    return read_json(directory / _IMAGE_PROCESSOR) if is_there(directory / _IMAGE_PROCESSOR) else None


def _with_type(settings: Json, directory: Path) -> Json:
    """The settings with the class that they are for.

    Where they name none, transformers finds it by the checkpoint's config.json, which an engine lacks. LLaVA's own code
    takes CLIP's class, whatever the checkpoint says.
    """
    if settings.get(_TYPE) is not None or settings.get("feature_extractor_type") is not None:
        return settings
    try:
        found = load_image_processor(directory).to_dict().get(_TYPE)
    except EngineError:
        found = None
    return {**settings, _TYPE: found or _CLIP_TYPE}


def _check_image_size(settings: Json, image_size: int) -> None:
    key = "crop_size" if settings.get("do_center_crop", True) and settings.get("crop_size") else "size"
    value = settings.get(key)
    sides = value.values() if isinstance(value, dict) else [value]
    if any(side != image_size for side in sides if side is not None):
        raise ConfigError(
            f"{_IMAGE_PROCESSOR}: {key} is {shown(value)}, but the vision tower takes images of {image_size} pixels"
        )


def _default_settings(vision: ClipConfig) -> dict[str, Any]:
    """As the towers were trained: CLIP on a square out of the middle, SigLIP on the whole image, made square."""
    square = {"height": vision.image_size, "width": vision.image_size}
    if isinstance(vision, SiglipConfig):
        return {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": _SIGLIP_MEAN_AND_STD,
            _TYPE: "SiglipImageProcessor",
            "image_std": _SIGLIP_MEAN_AND_STD,
            "resample": 3,  # bicubic
            "rescale_factor": 1 / 255,
            "size": square,
        }
    return {
        "crop_size": square,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": _CLIP_MEAN,
        _TYPE: _CLIP_TYPE,
        "image_std": _CLIP_STD,
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": vision.image_size},
    }
