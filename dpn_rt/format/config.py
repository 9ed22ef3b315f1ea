"""Frozen configuration of an engine: what the model is, never how it is run.

Every class maps to one object of `engine.json`; `to_json` and `from_json` are exact inverses, and an unknown or
missing key is an error that names it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dpn_rt.errors import ConfigError

DType = Literal["float32", "bfloat16", "float16"]
PoolingType = Literal["adaptive", "static", "random"]
PoolingFunction = Literal["max", "avg", "conv"]
RouterVersion = Literal["v1", "v2"]
Activation = Literal["quick_gelu", "gelu"]
ProjectorType = Literal["mlp2x_gelu", "linear"]
SelectFeature = Literal["patch", "cls_patch"]
AspectRatio = Literal["pad", "processor"]
PromptTemplate = Literal["vicuna_v1", "tokenizer"]

IMAGE_PLACEHOLDER_ID = -200
"""Stands for the image in prompt token ids; one id, whatever the number of visual tokens (as in LLaVA)."""

OLDEST_CAPABILITY = (8, 0)
"""Compute capability of a GPU: the CUDA kernels are built for no older one."""

MIN_VISUAL_TOKENS = 16
"""A boundary leaves a sample with fewer visual tokens untouched (published behaviour)."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `theta`, and transformers' `rope_scaling` dictionary as JSON text (empty: none)."""

    theta: float
    scaling_json: str = ""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """LLaMA decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """CLIP vision tower, cut after the layer whose hidden state is used."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    """Layers that run (select layer -2 of a 24-layer tower: 23)."""
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    activation: Activation
    select_feature: SelectFeature

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_visual_tokens(self) -> int:
        """Rows that one image puts into the prompt."""
        return self.grid[0] * self.grid[1] + (self.select_feature == "cls_patch")


@dataclass(frozen=True, slots=True)
class ProjectorConfig:
    """Projector from vision hidden size to decoder hidden size."""

    type: ProjectorType
    input_size: int


@dataclass(frozen=True, slots=True)
class BoundaryConfig:
    """Routing and pooling on the output of decoder layer `layer`."""

    layer: int
    kernels: tuple[tuple[int, int], ...]
    """(kernel height, kernel width) per expert; stride equals kernel."""

    @property
    def num_experts(self) -> int:
        return len(self.kernels)

    @property
    def largest_area(self) -> int:
        return max(height * width for height, width in self.kernels)


@dataclass(frozen=True, slots=True)
class PyramidConfig:
    """Dynamic pooling of visual tokens inside the decoder; no boundaries means a dense model."""

    boundaries: tuple[BoundaryConfig, ...] = ()
    pooling_type: PoolingType = "adaptive"
    pooling_function: PoolingFunction = "max"
    router_version: RouterVersion = "v1"
    use_router_token: bool = False
    """Route on the rows of `<ROUTER>` tokens; otherwise on the last row of the prompt."""

    def stage_layers(self, num_layers: int) -> tuple[range, ...]:
        """Decoder layers of each stage."""
        starts = [0, *(boundary.layer + 1 for boundary in self.boundaries)]
        ends = [*starts[1:], num_layers]
        return tuple(range(start, end) for start, end in zip(starts, ends, strict=True))


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """Special tokens and how text and image become a prompt."""

    template: PromptTemplate
    image_aspect_ratio: AspectRatio
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    image_token_id: int | None
    """The tokenizer's own id of `<image>`, where it has one."""
    router_token_id: int | None
    has_tokenizer: bool
    has_image_processor: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything about the model that an engine holds."""

    dtype: DType
    decoder: DecoderConfig
    pyramid: PyramidConfig
    prompt: PromptConfig
    vision: VisionConfig | None
    projector: ProjectorConfig | None


T = TypeVar("T")


def to_json(config: Any) -> Any:
    """Plain JSON values of a configuration dataclass (tuples become lists)."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return config


def from_json(cls: type[T], value: Any, path: str = "config") -> T:
    """The configuration of class `cls` from JSON values.

    Raises:
        ConfigError: a key is missing or unknown, or a value has the wrong type; the message names the path.
    """
    result: T = _parse(cls, value, path)
    return result


def _parse(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, path)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _parse(args[0], value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        items = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(items) != len(value):
            raise ConfigError(f"{path}: expected {len(items)} items, got {value!r}")
        pairs = zip(items, value, strict=True)
        return tuple(_parse(item, part, f"{path}[{i}]") for i, (item, part) in enumerate(pairs))
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{path}: expected one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: expected {kind.__name__}, got {value!r}")
    return value


def _parse_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected an object, got {value!r}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    missing, unknown = [n for n in names if n not in value], [n for n in value if n not in names]
    if missing or unknown:
        raise ConfigError(f"{path}: missing keys {missing}, unknown keys {unknown}")
    return kind(**{name: _parse(hints[name], value[name], f"{path}.{name}") for name in names})
