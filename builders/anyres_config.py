"""How checkpoints say that a model sees images in tiles."""

from __future__ import annotations

import re
from typing import Any

from dpn_rt.builders.json_values import Json, choice_of, name_of, value_of
from dpn_rt.errors import ConfigError
from dpn_rt.model.vision.anyres.config import AnyresConfig, SeveralImages
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.schema.bounds import bounded
from dpn_rt.schema.text import shown

_PINPOINTS = "image_grid_pinpoints"
_MAX_TILES = re.compile(r"anyres_max_(\d{1,4})")

_NEXT_RESOLUTIONS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_ONEVISION_SIDES = range(384, 2305, 384)
_ONEVISION_RESOLUTIONS = tuple((height, width) for height in _ONEVISION_SIDES for width in _ONEVISION_SIDES)


def next_config(config: Json, tower: ClipConfig) -> AnyresConfig:
    """LLaVA-NeXT's images: each in up to as many tiles as the largest resolution has.

    Raises:
        ConfigError: the resolutions are no pairs of whole numbers, or the tower gives no grid.
    """
    return _anyres(config, tower, _NEXT_RESOLUTIONS, None, several="tiled")


def onevision_config(config: Json, tower: ClipConfig) -> AnyresConfig:
    """LLaVA-OneVision's images: one alone in tiles, whose visual tokens are scaled down to those of a number of tiles.

    Raises:
        ConfigError: as `next_config`, or `vision_aspect_ratio` has another form than anyres_max_9.
    """
    ratio = value_of(config, "vision_aspect_ratio", str, "anyres_max_9")
    found = _MAX_TILES.fullmatch(ratio)
    if found is None:
        raise ConfigError(f"{name_of(config, 'vision_aspect_ratio')}: expected anyres_max_ and a number, got {ratio!r}")
    return _anyres(config, tower, _ONEVISION_RESOLUTIONS, int(found[1]), several="whole")


def original_anyres_config(config: Json, tower: ClipConfig) -> AnyresConfig:
    """The images of LLaVA-NeXT's own code, whose config.json says `"image_aspect_ratio": "anyres"`.

    Raises:
        ConfigError: as `next_config`, or tiles are put together in another way than by "spatial_unpad".
    """
    choice_of(config, "mm_patch_merge_type", ("spatial_unpad",))
    return next_config(config, tower)


def _anyres(
    config: Json,
    tower: ClipConfig,
    default: tuple[tuple[int, int], ...],
    max_tiles: int | None,
    *,
    several: SeveralImages,
) -> AnyresConfig:
    if tower.select_feature != "patch":
        raise ConfigError("config.json: images in tiles need a grid of visual tokens, but the class token is kept")
    given = config.get(_PINPOINTS)
    resolutions = default if given is None else _resolutions(config, given)
    return bounded(AnyresConfig(tower, resolutions, max_tiles, several), "vision ")


def _resolutions(config: Json, given: Any) -> tuple[tuple[int, int], ...]:
    pairs: list[Any] = given if isinstance(given, list) else [given]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(side) is int for side in pair):
            raise ConfigError(
                f"{name_of(config, _PINPOINTS)}: expected a list of [height, width] in pixels, got {shown(given)}"
            )
    return tuple((height, width) for height, width in pairs)
