"""Checks of a model configuration beyond the types of its values; used for checkpoints and for engines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dpn_rt.errors import ConfigError
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.rope import rope_frequencies


def check_model(model: ModelConfig) -> None:
    """Refuse a model configuration whose values contradict each other.

    Raises:
        ConfigError: lists every problem.
    """
    problems = [*_decoder(model.decoder), *_boundaries(model.reduction.layers, model.decoder)]
    if model.vision is not None:
        problems += model.vision.problems(needs_grid=model.reduction.needs_grid)
        if model.projector is None:
            problems.append("a vision tower needs a projector, there is none")
        elif model.projector.input_size != model.vision.hidden_size:
            problems.append(
                f"the projector takes {model.projector.input_size} features, the vision tower gives "
                f"{model.vision.hidden_size}"
            )
    problems += _router_token(model)
    if model.quantize != "none" and model.dtype == "float16":
        problems.append(
            f"quantize {model.quantize}: weights in 8 and 4 bits are multiplied with float32 or bfloat16, "
            "dtype is float16"
        )
    # The grid of a vision tower is known only where its sizes, checked above, make sense.
    grid = None if problems or model.vision is None or not model.reduction.layers else model.vision.grid
    problems += model.reduction.problems(model.decoder.hidden_size, grid)
    if problems:
        raise ConfigError("; ".join(problems))


def _router_token(model: ModelConfig) -> Iterator[str]:
    router = model.prompt.router_token_id
    if router is None and model.reduction.reads_router_rows and model.reduction.use_router_token:
        yield "the router reads a <ROUTER> token, but the model has no router_token_id"
    if router is not None and not 0 <= router < model.decoder.vocab_size:
        yield f"router_token_id {router} is outside the vocabulary of {model.decoder.vocab_size}"


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


def _boundaries(layers: Sequence[int], decoder: DecoderConfig) -> Iterator[str]:
    for layer in layers:
        if not 0 <= layer < decoder.num_layers:
            yield f"pooling layer {layer} does not exist: the decoder has layers 0 to {decoder.num_layers - 1}"
        elif layer == decoder.num_layers - 1:
            yield f"pooling layer {layer} is the last layer: no layer would see the pooled rows"
    if sorted(set(layers)) != list(layers):
        yield f"pooling layers must rise without repetition, got {list(layers)}"
