"""How an engine is run: what the user asked for (`EngineOptions`), and the limits that follow (`EngineSettings`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpn_rt.errors import ConfigError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.plans import PlanLimits
from dpn_rt.model.reduction.spec import Spec
from dpn_rt.model.shards import check_shards
from dpn_rt.prompts.image import MAX_PIXELS
from dpn_rt.prompts.prompt import MAX_IMAGES
from dpn_rt.schema.bounds import is_whole
from dpn_rt.schema.text import shown

LEAST_BATCHED_TOKENS = 8192
"""Default of `max_num_batched_tokens` for models that are shorter."""

MOST_DEFAULT_LENGTH = 2**20
"""Default of `max_model_len` for models that are longer. Tables of so many rows take a second, or half a gigabyte of
angles where heads have 128 features; a wrong number in a file could ask for gigabytes and most of a minute."""


@dataclass(frozen=True)
class EngineOptions:
    """What the user asked for, checked; None: a default that depends on model and machine.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    max_num_seqs: int = 64
    """Sequences that run at one time."""
    max_num_batched_tokens: int | None = None
    """Rows at stage 0 of one prefill step. Default: the model's length, at least 8192."""
    max_chunk_tokens: int | None = None
    """Prefills are cut into parts of the work of so many tokens while other requests decode. Default: not cut."""
    max_model_len: int | None = None
    """Rows of one request at stage 0, at most. Default: the model's `max_position_embeddings`, at most
    `MOST_DEFAULT_LENGTH`."""
    kv_cache_bytes: int | None = None
    """Bytes of the KV pool of each rank. Default: a quarter of the free memory, on a GPU what is left of
    `gpu_memory_utilization`; no more than `max_num_seqs` requests of full length need."""
    reuse_bytes: int = 0
    """Memory for images' rows that may come again, and as much again for those that go with cached prefixes. 0: nothing
    is reused, KV blocks of prefixes neither."""
    block_size: int = 16
    """Rows per KV block."""
    gpu_memory_utilization: float = 0.9
    """Part of a GPU's memory that may be taken in all."""
    max_graph_rows: int = 2048
    """Rows of a prefill stage, at most, that are launched as a graph on a GPU; 0: stages are not recorded."""
    max_image_pixels: int = MAX_PIXELS
    """Pixels of one image, at most."""
    limit_mm_per_prompt: Mapping[str, int] | None = None
    """`{"image": N}`: images of one prompt, at most. Default: 16."""
    prepack_weights: bool | None = None
    """Keep a second copy of the weights in oneDNN's layout: prefill gets about 5 % faster. Default: if the copy takes
    less than a third of the free memory."""
    copy_weights: bool | None = None
    """Copy the weights from the engine's file into huge pages, from which virtual machines read them faster. Default:
    on the CPU, if the system has huge pages and the copy takes less than half of the free memory, after a prepacked
    one. Ranks copy their parts in any case, into small pages where this is False."""
    reduce: Spec | Sequence[Spec] | None = None
    """SPECs of training-free reductions that requests may ask for; the first is the default. None: the engine's."""
    tensor_parallel_size: int = 1
    """Processes that share the decoder."""

    def __post_init__(self) -> None:
        for name in ("reuse_bytes", "max_graph_rows"):
            self._check_count(name, least=0)
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization={shown(share)}: expected a number above 0 and at most 1")
        for name in ("max_num_seqs", "block_size", "max_image_pixels", "tensor_parallel_size"):
            self._check_count(name)
        for name in ("max_num_batched_tokens", "max_chunk_tokens", "max_model_len", "kv_cache_bytes"):
            if getattr(self, name) is not None:
                self._check_count(name, least=2 if name == "max_model_len" else 1)  # a row to ask, and one to answer
        for name in ("prepack_weights", "copy_weights"):
            if (value := getattr(self, name)) is not None and not isinstance(value, bool):
                raise ConfigError(f"{name}={shown(value)}: expected True, False or None")
        _ = self.max_images  # raises if the limit is none

    @property
    def max_images(self) -> int:
        """Images of one prompt, at most."""
        limits = {} if self.limit_mm_per_prompt is None else self.limit_mm_per_prompt
        expected = 'expected {"image": N} with a whole number N of at least 0'
        if not isinstance(limits, Mapping) or set(limits) - {"image"}:
            raise ConfigError(f"limit_mm_per_prompt={shown(limits)}: {expected}")
        value = limits.get("image", MAX_IMAGES)
        if not is_whole(value, 0):
            raise ConfigError(f"limit_mm_per_prompt={shown(dict(limits))}: {expected}")
        return value

    def _check_count(self, name: str, *, least: int = 1) -> None:
        value = getattr(self, name)
        if not is_whole(value, least):
            raise ConfigError(f"{name}={shown(value)}: expected a whole number of at least {least}")


@dataclass(frozen=True)
class EngineSettings:
    """The limits of one engine, after `resolve`. No other place derives one."""

    max_num_seqs: int
    """Sequences that run at one time."""
    max_num_batched_tokens: int
    """Rows at stage 0 of one prefill step; a longer prompt is prefilled alone."""
    max_chunk_tokens: int | None
    """Work of one part of a prefill while other requests decode, in tokens through all layers; None: prefills are not
    cut."""
    max_model_len: int
    """Rows of one request at stage 0, at most: prompt, images and answer."""
    kv_cache_bytes: int | None
    """Bytes of the KV pool; None: what the memory has room for once the weights are loaded, and no more than
    `max_num_seqs` requests of full length need."""
    reuse_bytes: int
    """Memory for images' rows that may come again, and as much again for those that go with cached prefixes; 0:
    nothing is reused."""
    block_size: int
    """Rows per KV block."""
    gpu_memory_utilization: float
    """Part of a GPU's memory that may be taken in all."""
    max_graph_rows: int
    """Rows of a prefill stage, at most, that are launched as a graph on a GPU; 0: stages are not recorded."""
    max_image_pixels: int
    """Pixels of one image, at most."""
    max_images: int
    """Images of one prompt, at most."""
    prepack_weights: bool | None
    """Whether a second copy of the weights is kept in oneDNN's layout; None: if it takes less than a third of the
    memory that is free when they are loaded."""
    copy_weights: bool | None
    """Whether weights on the CPU are copied into huge pages; None: see `EngineOptions`."""
    tensor_parallel_size: int
    """Processes that share the decoder."""

    @property
    def max_prefill_tokens(self) -> int:
        """Rows at stage 0 of the largest prefill step."""
        return max(self.max_num_batched_tokens, self.max_model_len)


def resolve(model: ModelConfig, options: EngineOptions, plans: PlanLimits | None = None) -> EngineSettings:
    """The settings of an engine.

    Args:
        model: of the engine.
        options: of the user.
        plans: what the engine's TensorRT plans were built for; None: it has none. Plans take prefills as a whole.

    Raises:
        ConfigError: the model or its plans cannot serve an option.
    """
    max_model_len = _max_model_len(model, options)
    max_num_seqs, max_chunk_tokens = options.max_num_seqs, options.max_chunk_tokens
    if plans is not None:
        _check_plans(options, plans)
        max_model_len = min(max_model_len, plans.stage_rows[0])
        max_num_seqs, max_chunk_tokens = min(max_num_seqs, plans.max_batch), None
    check_shards(model.decoder, model.quantize, options.tensor_parallel_size)
    return EngineSettings(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens or max(LEAST_BATCHED_TOKENS, max_model_len),
        max_chunk_tokens=max_chunk_tokens,
        max_model_len=max_model_len,
        kv_cache_bytes=options.kv_cache_bytes,
        reuse_bytes=options.reuse_bytes,
        block_size=options.block_size,
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_graph_rows=options.max_graph_rows,
        max_image_pixels=options.max_image_pixels,
        max_images=options.max_images,
        prepack_weights=options.prepack_weights,
        copy_weights=options.copy_weights,
        tensor_parallel_size=options.tensor_parallel_size,
    )


def _max_model_len(model: ModelConfig, options: EngineOptions) -> int:
    limit = model.decoder.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > limit:
        raise ConfigError(f"max_model_len={options.max_model_len}: expected at most {limit}, the model's length")
    return options.max_model_len or min(limit, MOST_DEFAULT_LENGTH)


def _check_plans(options: EngineOptions, plans: PlanLimits) -> None:
    if options.tensor_parallel_size > 1:
        raise ConfigError(
            f"tensor_parallel_size={options.tensor_parallel_size}: expected 1, TensorRT plans were built for one GPU"
        )
    if options.kv_cache_bytes is not None:
        raise ConfigError(
            f"kv_cache_bytes={options.kv_cache_bytes}: expected none, the KV caches of an engine with TensorRT plans "
            f"are {plans.max_batch} slots of {list(plans.stage_rows)} rows per stage, as it was built"
        )
