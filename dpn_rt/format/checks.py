"""Checks of a model configuration that go beyond the type of each value.

A checkpoint's configuration and an engine's manifest both pass here, so what the runtime is given fits together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from dpn_rt.errors import ConfigError
from dpn_rt.format.config import MIN_VISUAL_TOKENS, DecoderConfig, ModelConfig, PyramidConfig, VisionConfig
from dpn_rt.format.rope import rope_frequencies

Grid = tuple[int, int]


def check_model(model: ModelConfig) -> None:
    """Refuse a model configuration whose values contradict each other.

    Raises:
        ConfigError: every problem found, in one message.
    """
    problems = [*_decoder(model.decoder), *_pyramid(model.pyramid, model.decoder)]
    if model.vision is not None:
        problems += _vision(model.vision)
        if model.projector is None:
            problems.append("a vision tower needs a projector, there is none")
        elif model.projector.input_size != model.vision.hidden_size:
            problems.append(
                f"the projector takes {model.projector.input_size} features, the vision tower gives "
                f"{model.vision.hidden_size}"
            )
    router = model.prompt.router_token_id
    pyramid = model.pyramid
    if router is None and pyramid.boundaries and pyramid.pooling_type == "adaptive" and pyramid.use_router_token:
        problems.append("the router reads a <ROUTER> token, but the model has no router_token_id")
    if router is not None and not 0 <= router < model.decoder.vocab_size:
        problems.append(f"router_token_id {router} is outside the vocabulary of {model.decoder.vocab_size}")
    if not problems and model.vision is not None and model.pyramid.boundaries:
        problems += _kernels_fit(model.pyramid, model.vision)
    if problems:
        raise ConfigError("; ".join(problems))


def _decoder(config: DecoderConfig) -> Iterator[str]:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in (*sizes, "max_position_embeddings", "rms_norm_eps"):
        if not 0 < getattr(config, name) < math.inf:
            yield f"{name} must be positive, got {getattr(config, name)}"
            return
    if config.num_heads % config.num_kv_heads:
        yield f"num_heads {config.num_heads} is not a multiple of num_kv_heads {config.num_kv_heads}"
    if config.head_dim % 2:
        yield f"head_dim must be even (rotary embedding turns pairs), got {config.head_dim}"
    if not 0 < config.rope.theta < math.inf:
        yield f"rope theta must be positive, got {config.rope.theta}"
    elif config.rope.scaling_json:
        try:
            rope_frequencies(config)
        except ConfigError as error:
            yield str(error)


def _pyramid(config: PyramidConfig, decoder: DecoderConfig) -> Iterator[str]:
    layers = [boundary.layer for boundary in config.boundaries]
    for layer in layers:
        if not 0 <= layer < decoder.num_layers:
            yield f"pooling layer {layer} does not exist: the decoder has layers 0 to {decoder.num_layers - 1}"
        elif layer == decoder.num_layers - 1:
            yield f"pooling layer {layer} is the last layer: no layer would see the pooled rows"
    if sorted(set(layers)) != layers:
        yield f"pooling layers must rise without repetition, got {layers}"
    for boundary in config.boundaries:
        if not boundary.kernels:
            yield f"pooling layer {boundary.layer} has no kernels"
        if any(side <= 0 for kernel in boundary.kernels for side in kernel):
            yield f"pooling layer {boundary.layer}: kernel sides must be positive, got {list(boundary.kernels)}"
        if config.pooling_type == "static" and len(boundary.kernels) != 1:
            yield f"pooling layer {boundary.layer}: static pooling has one kernel, got {list(boundary.kernels)}"
    if config.boundaries and config.router_version == "v1" and decoder.hidden_size % 4:
        yield f"a v1 router needs a hidden size that is a multiple of 4, got {decoder.hidden_size}"


def _vision(config: VisionConfig) -> Iterator[str]:
    for name in ("hidden_size", "intermediate_size", "num_heads", "image_size", "patch_size", "layer_norm_eps"):
        if not 0 < getattr(config, name) < math.inf:
            yield f"vision {name} must be positive, got {getattr(config, name)}"
            return
    if config.num_layers < 0:
        yield f"vision num_layers must not be negative, got {config.num_layers}"
    if config.hidden_size % config.num_heads:
        yield f"vision hidden_size {config.hidden_size} is not a multiple of its num_heads {config.num_heads}"
    if config.image_size < config.patch_size:
        yield f"vision image_size {config.image_size} is smaller than its patch_size {config.patch_size}"


def _kernels_fit(pyramid: PyramidConfig, vision: VisionConfig) -> Iterator[str]:
    """A kernel that fits none of the grids that can reach its boundary would never pool: the checkpoint is wrong.

    One that fits some of them is left to the request, whose route decides.
    """
    if vision.select_feature != "patch":
        yield "pooling needs a grid of visual tokens, but the class token is kept (select feature cls_patch)"
        return
    reachable: set[Grid] = {vision.grid}
    for boundary in pyramid.boundaries:
        for kernel in boundary.kernels:
            if not any(_fits(kernel, grid) for grid in reachable):
                grids = ", ".join(f"{height}x{width}" for height, width in sorted(reachable, reverse=True))
                yield f"pooling layer {boundary.layer}: kernel {list(kernel)} does not fit the visual grid ({grids})"
        pooled: set[Grid] = set()
        for grid in reachable:
            num_tokens = grid[0] * grid[1]
            if num_tokens < max(MIN_VISUAL_TOKENS, boundary.largest_area):
                pooled.add(grid)
                continue
            pooled |= {(grid[0] // k[0], grid[1] // k[1]) for k in boundary.kernels if _fits(k, grid)}
        reachable = pooled or reachable


def _fits(kernel: Grid, grid: Grid) -> bool:
    return kernel[0] <= grid[0] and kernel[1] <= grid[1]
