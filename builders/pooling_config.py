"""Reads the reduction's configuration from the `pooling` object of config.json."""

from __future__ import annotations

from typing import Any, cast

from dpn_rt.builders.json_values import Json, Section, choice_of, name_of, object_of, value_of
from dpn_rt.errors import ConfigError
from dpn_rt.format.config import ReductionConfig
from dpn_rt.model.reduction.pooling_config import (
    BoundaryConfig,
    PoolingConfig,
    PoolingFunction,
    PoolingType,
    RouterVersion,
)
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.schema.bounds import FEW, bounded
from dpn_rt.schema.text import shown

Kernel = tuple[int, int]


def prepooling(values: Json) -> bool:
    """Whether visual features are averaged before the projector.

    Raises:
        ConfigError: the value is neither true nor false.
    """
    pooling = object_of(values, "pooling")
    return pooling is not None and value_of(pooling, "prepooling", bool, False)


def reduction_config(values: Json, *, may_prepool: bool = False) -> ReductionConfig:
    """The pooling of a checkpoint; without a `pooling` object the model is dense.

    Args:
        may_prepool: whether the vision tower can average features before the projector.

    Raises:
        ConfigError: a type, function, version or location is unknown, or a layer's kernels are invalid.
    """
    pooling = object_of(values, "pooling")
    if pooling is None:
        return NoReduction()
    pooling_type = choice_of(pooling, "pooling_type", ("adaptive", "static", "random"))
    pooling_function = choice_of(pooling, "pooling_function", ("max", "avg", "conv"), "max")
    router_version = choice_of(pooling, "router_version", ("v1", "v2"), "v1")
    choice_of(pooling, "pooling_location", ("post",), "post")
    if prepooling(values) and not may_prepool:
        raise ConfigError(f"{name_of(pooling, 'prepooling')} is not supported without a LLaVA-HR tower, expected false")
    layers = pooling.get("pooling_layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ConfigError(f"{name_of(pooling, 'pooling_layers')}: expected a list of objects, got {shown(layers)}")
    if len(layers) > FEW.most:
        raise ConfigError(f"{name_of(pooling, 'pooling_layers')}: {len(layers):,} layers, expected at most {FEW.most}")
    is_static = pooling_type == "static"
    boundaries = tuple(
        _boundary(Section(layer, name_of(pooling, f"pooling_layers[{position}].")), is_static)
        for position, layer in enumerate(layers)
    )
    if not boundaries:
        return NoReduction()
    config = PoolingConfig(
        boundaries=boundaries,
        pooling_type=cast(PoolingType, pooling_type),
        pooling_function=cast(PoolingFunction, pooling_function),
        router_version=cast(RouterVersion, router_version),
        use_router_token=value_of(pooling, "use_special_token", bool, False),
    )
    return bounded(config, name_of(pooling, ""))


def _boundary(layer: Json, static: bool) -> BoundaryConfig:
    index = value_of(layer, "index", int)
    kernels = _kernels(layer, "kernel_size", static)
    if layer.get("stride") is not None:
        strides = _kernels(layer, "stride", static)
        if strides != kernels:
            wanted, got = shown(_lists(kernels)), shown(_lists(strides))
            raise ConfigError(f"{name_of(layer, 'stride')} must equal kernel_size {wanted}, got {got}")
    return BoundaryConfig(index, kernels)


def _kernels(layer: Json, key: str, static: bool) -> tuple[Kernel, ...]:
    """A list of pairs; static pooling may give its one pair without a list."""
    value = layer.get(key)
    pairs = [value] if static and _is_pair(value) else value
    if not isinstance(pairs, list) or not pairs or not all(_is_pair(pair) for pair in pairs):
        wanted = "[height, width]" if static else "a list of [height, width]"
        raise ConfigError(f"{name_of(layer, key)}: expected {wanted}, got {shown(value)}")
    return tuple((pair[0], pair[1]) for pair in pairs)


def _is_pair(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [None]
    return all(isinstance(side, int) and not isinstance(side, bool) for side in sides)


def _lists(kernels: tuple[Kernel, ...]) -> list[list[int]]:
    return [list(kernel) for kernel in kernels]
