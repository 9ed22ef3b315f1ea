"""Checks of a model configuration beyond the types of its values; used for checkpoints and for engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dpn_rt import ops
from dpn_rt.errors import ConfigError
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.reduction.chain import Chain, chain_problems
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.model.rope import rope_frequencies
from dpn_rt.schema.bounds import bound_problems


def check_model(model: ModelConfig) -> None:
    """Refuse a model configuration whose values contradict each other.

    Raises:
        ConfigError: lists every problem.
    """
    problems = list(bound_problems(model))
    if problems:
        raise ConfigError("; ".join(problems))
    problems = [*_decoder(model.decoder), *_head_dims(model), *_boundaries(model.reduction.layers, model.decoder)]
    if isinstance(model.reduction, Chain):
        problems += chain_problems(model.reduction, model.decoder.num_layers)
    if model.vision is not None:
        problems += model.vision.problems(needs_grid=model.reduction.needs_grid)
        if model.projector is None:
            problems.append("a vision tower needs a projector, there is none")
        elif model.projector.input_size != model.vision.hidden_size:
            problems.append(
                f"the projector takes {model.projector.input_size} features, the vision tower gives "
                f"{model.vision.hidden_size}"
            )
    problems += _token_ids(model)
    if model.quantize != "none" and model.dtype == "float16":
        problems.append(
            f"quantize {model.quantize}: weights in 8 and 4 bits are multiplied with float32 or bfloat16, "
            "dtype is float16"
        )
    # The grid of a vision tower is known only where its sizes, checked above, make sense.
    grid = None if problems or model.vision is None or not model.reduction.layers else model.vision.grid
    if not problems and isinstance(model.reduction, PoolingConfig) and model.vision is not None and grid is None:
        problems.append("trained pooling needs one grid of visual tokens per image, but images come in tiles (anyres)")
    problems += model.reduction.problems(model.decoder.hidden_size, grid)
    if problems:
        raise ConfigError("; ".join(problems))


def _token_ids(model: ModelConfig) -> Iterator[str]:
    router = model.prompt.router_token_id
    if router is None and model.reduction.reads_router_rows and model.reduction.use_router_token:
        yield "the router reads a <ROUTER> token, but the model has no router_token_id"
    size, prompt = model.decoder.vocab_size, model.prompt
    ids = {"router_token_id": [router], "bos_token_id": [prompt.bos_token_id], "eos_token_ids": prompt.eos_token_ids}
    for name, values in ids.items():  # an image's own id is replaced before it would be embedded
        for value in values:
            if value is not None and value >= size:
                yield f"{name} {value} is outside the vocabulary of {size}"


def _decoder(config: DecoderConfig) -> Iterator[str]:
    if config.num_heads % config.num_kv_heads:
        yield (
            f"num_heads {config.num_heads} is not a multiple of num_kv_heads {config.num_kv_heads} (in config.json "
            "num_attention_heads and num_key_value_heads; without the latter, that of the decoder's family counts)"
        )
    if len(config.windows) not in (0, config.num_layers):
        yield f"windows has {len(config.windows)} entries, expected none or one for each of {config.num_layers} layers"
    if config.rope.scaling_json:
        try:
            rope_frequencies(config)
        except ConfigError as error:
            yield str(error)


def _head_dims(model: ModelConfig) -> Iterator[str]:
    towers = () if model.vision is None else model.vision.head_dims
    for name, size in [
        ("head_dim", model.decoder.head_dim),
        *(("head_dim of the vision tower", each) for each in towers),
    ]:
        if size not in ops.HEAD_DIMS:
            least, most = ops.HEAD_DIMS[0], ops.HEAD_DIMS[-1]
            yield f"{name} is {size}, expected a multiple of {ops.HEAD_DIMS.step} from {least} to {most}"


def _boundaries(layers: Sequence[int], decoder: DecoderConfig) -> Iterator[str]:
    for layer in layers:
        if not 0 <= layer < decoder.num_layers:
            yield f"pooling layer {layer} does not exist: the decoder has layers 0 to {decoder.num_layers - 1}"
        elif layer == decoder.num_layers - 1:
            yield f"pooling layer {layer} is the last layer: no layer would see the pooled rows"
    if sorted(set(layers)) != list(layers):
        yield f"pooling layers must rise without repetition, got {list(layers)}"
