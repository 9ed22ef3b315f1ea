"""Engine directory -> the parts that run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpn_rt.backends.kernels.gpu import open_cuda
from dpn_rt.backends.kernels.loading import DeviceLimits, load_kernel_backend
from dpn_rt.backends.tensorrt import cuda
from dpn_rt.backends.tensorrt.loading import load_plan_backend
from dpn_rt.cache.image_cache import ImageCache
from dpn_rt.device.device import Device
from dpn_rt.device.host import HostDevice, free_memory
from dpn_rt.engine.detokenizer import Detokenizer
from dpn_rt.engine.engine import Engine
from dpn_rt.engine.images import ImageRows
from dpn_rt.engine.prefix_cache import PrefixCache, PrefixCacheConfig
from dpn_rt.engine.runner import Runner
from dpn_rt.engine.scheduler import Scheduler, SchedulerConfig
from dpn_rt.errors import ConfigError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.format.plans import PlanLimits
from dpn_rt.model.weights.dense import can_prepack
from dpn_rt.prompts.image import MAX_PIXELS
from dpn_rt.prompts.processor import Processor
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.sampling.sampler import Sampler
from dpn_rt.schema.weights import TORCH_DTYPES

CPU_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class RuntimeConfig:
    """How an engine is run; every None is replaced by a default from model and machine."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    """Default: the model's length, at least 8192."""
    max_chunk_tokens: int | None = None
    """Prefills are cut into parts of the work of so many tokens while other requests decode. Default: not cut."""
    max_length: int | None = None
    """Rows of one request at stage 0, at most. Default: the model's `max_position_embeddings`."""
    kv_cache_bytes: int | None = None
    """Default: a quarter of the free memory, or what `max_num_seqs` requests of full length need if that is less."""
    reuse_bytes: int = 0
    """Memory for images' rows that may come again, and as much again for those that go with kept prefixes. 0: nothing
    is reused, KV blocks of prefixes neither."""
    block_size: int = 16
    """Rows per KV block."""
    gpu_memory_utilization: float = 0.9
    """Part of a GPU's memory that may be taken in all; what weights and the largest prefill leave of it is the KV
    pool's, unless `kv_cache_bytes` says otherwise."""
    max_image_pixels: int = MAX_PIXELS
    prepack: bool | None = None
    """Keep a second copy of the weights in oneDNN's layout: prefill gets about 5 % faster. Default: when the copy
    takes less than a third of the free memory."""

    def __post_init__(self) -> None:
        if isinstance(self.reuse_bytes, bool) or not isinstance(self.reuse_bytes, int) or self.reuse_bytes < 0:
            raise ConfigError(f"reuse_bytes={self.reuse_bytes!r}: expected a whole number of at least 0")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization={share!r}: expected a number above 0 and at most 1")
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_chunk_tokens",
            "max_length",
            "kv_cache_bytes",
            "block_size",
            "max_image_pixels",
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r}: expected a whole number of at least 1")


def check_device(device: str, engine: EngineDir) -> None:
    """Refuse a device that is unknown or cannot run the engine.

    Raises:
        ConfigError: naming what would work.
    """
    model = engine.model
    if engine.plans is not None:
        if device not in ("auto", "cuda"):
            raise ConfigError(f"device={device!r}: expected 'auto' or 'cuda', TensorRT plans run on GPUs alone")
        return
    if device == "cuda":
        return  # `open_cuda` knows what a GPU takes
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device={device!r}: expected 'auto', 'cpu' or 'cuda'")
    if model.dtype not in CPU_DTYPES:
        raise ConfigError(
            f"the engine's dtype is {model.dtype}, expected {' or '.join(CPU_DTYPES)} on the CPU: "
            "build it again with --dtype bfloat16, or use device='cuda'"
        )


@dataclass(frozen=True, eq=False)
class LoadedEngine:
    """An engine ready to step, and what makes its prompts."""

    model: ModelConfig
    processor: Processor
    engine: Engine


def load_engine(path: str | Path, device: str, config: RuntimeConfig, *, verify: bool = True) -> LoadedEngine:
    """An engine directory, loaded.

    Args:
        path: as `python -m dpn_rt.build` made it.
        device: "cpu" or "cuda"; "auto" is the CPU, and the GPU for an engine with plans.
        config: limits.
        verify: compare the files' sha256 with the engine's record before use.

    Raises:
        EngineError: the engine is incomplete, damaged, or of an unknown format.
        ConfigError: device or a limit cannot be served.
    """
    directory, config = _open(path, device, config, verify)
    processor = _processor(directory, config)
    engine = _engine(directory, device, config, processor.tokenizer, only_stops=False)
    return LoadedEngine(directory.model, processor, engine)


def load_bare_engine(path: str | Path, device: str, config: RuntimeConfig, *, verify: bool = True) -> Engine:
    """An engine without what makes its prompts (`load_processor`), which is another process's affair.

    It makes text only for requests with stop strings, which need it to end; that of the others is made of their ids.

    Raises:
        EngineError, ConfigError: as `load_engine`, whose arguments it takes.
    """
    directory, config = _open(path, device, config, verify)
    tokenizer = Tokenizer.load(directory.processor_path) if directory.model.prompt.has_tokenizer else None
    return _engine(directory, device, config, tokenizer, only_stops=True)


def load_processor(path: str | Path, device: str, config: RuntimeConfig, *, verify: bool = True) -> Processor:
    """What makes an engine's prompts, without its weights.

    Raises:
        EngineError, ConfigError: as `load_engine`, whose arguments it takes.
    """
    return _processor(*_open(path, device, config, verify))


def _open(path: str | Path, device: str, config: RuntimeConfig, verify: bool) -> tuple[EngineDir, RuntimeConfig]:
    """An engine that the device can run, and the configuration within what it was built for."""
    directory = EngineDir.open(path, verify=verify)
    check_device(device, directory)
    if directory.plans is not None:
        config = plan_runtime_config(config, directory.plans.limits, directory.model)
    return directory, config


def _processor(directory: EngineDir, config: RuntimeConfig) -> Processor:
    length = max_length(config, directory.model)
    return Processor(directory.processor_path, directory.model, max_length=length, max_pixels=config.max_image_pixels)


def _engine(
    directory: EngineDir, device: str, config: RuntimeConfig, tokenizer: Tokenizer | None, *, only_stops: bool
) -> Engine:
    model = directory.model
    runner = load_runner(directory, config, device)

    def make_detokenizer(params: SamplingParams) -> Detokenizer | None:
        is_needed = params.stop_strings or not only_stops
        return Detokenizer(tokenizer, params) if tokenizer is not None and is_needed else None

    return Engine(
        model,
        Scheduler(scheduler_config(config, model), model.reduction, runner.cache),
        runner,
        Sampler(None if tokenizer is None else tokenizer.token_text),
        max_length(config, model),
        None if config.max_chunk_tokens is None else config.max_chunk_tokens * model.decoder.num_layers,
        None if tokenizer is None else make_detokenizer,
    )


def plan_runtime_config(config: RuntimeConfig, limits: PlanLimits, model: ModelConfig) -> RuntimeConfig:
    """The configuration within what an engine's plans were built for. They take prefills whole, in no parts.

    Raises:
        ConfigError: a size was asked for that the plans have fixed.
    """
    if config.kv_cache_bytes is not None:
        raise ConfigError(
            f"kv_cache_bytes={config.kv_cache_bytes}: expected none, the KV caches of an engine with TensorRT plans "
            f"are {limits.max_batch} slots of {list(limits.stage_rows)} rows per stage, as it was built"
        )
    return dataclasses.replace(
        config,
        max_chunk_tokens=None,
        max_num_seqs=min(config.max_num_seqs, limits.max_batch),
        max_length=min(max_length(config, model), limits.stage_rows[0]),
    )


def load_runner(engine: EngineDir, config: RuntimeConfig, device: str) -> Runner:
    """The engine's parts with its weights in memory, and an empty KV cache.

    Raises:
        CapacityError: `kv_cache_bytes` holds not even one KV block, or the GPU has too little memory.
        ConfigError: the GPU cannot run the engine.
        PlanError: the engine's plans cannot be loaded on this machine.
    """
    model, weights = engine.model, engine.load_weights()
    image_cache = ImageCache(config.reuse_bytes) if config.reuse_bytes else None
    if engine.plans is not None:
        reader = cuda.CudaPlanReader(engine.plans, model)
        plans, encoder = load_plan_backend(engine, weights, reader)
        images = ImageRows(encoder, TORCH_DTYPES[model.dtype], image_cache)
        return Runner(plans, images)  # slots cannot be shared: no prefix cache
    host_or_gpu: Device = open_cuda(model) if device == "cuda" else HostDevice()
    prepack = device != "cuda" and _choose_prepack(config, weights, TORCH_DTYPES[model.dtype])
    limits = device_limits(config, model)
    backend, encoder = load_kernel_backend(model, weights, limits, host_or_gpu, prepack=prepack)
    prefixes = PrefixCache(PrefixCacheConfig(config.reuse_bytes), backend.cache) if config.reuse_bytes else None
    return Runner(backend, ImageRows(encoder, TORCH_DTYPES[model.dtype], image_cache), prefixes)


def device_limits(config: RuntimeConfig, model: ModelConfig) -> DeviceLimits:
    """What has to fit into memory."""
    length = max_length(config, model)
    return DeviceLimits(
        max_num_seqs=config.max_num_seqs,
        max_prefill_rows=max(scheduler_config(config, model).max_num_batched_tokens, length),
        max_length=length,
        block_size=config.block_size,
        kv_cache_bytes=config.kv_cache_bytes,
        reuse_bytes=config.reuse_bytes,
        utilization=config.gpu_memory_utilization,
    )


def scheduler_config(config: RuntimeConfig, model: ModelConfig) -> SchedulerConfig:
    """Budgets of a step."""
    tokens = config.max_num_batched_tokens
    return SchedulerConfig(
        config.max_num_seqs,
        max(8192, max_length(config, model)) if tokens is None else tokens,
        takes_turns=config.max_chunk_tokens is not None,
    )


def max_length(config: RuntimeConfig, model: ModelConfig) -> int:
    """Rows of one request at stage 0, at most.

    Raises:
        ConfigError: more was asked for than the model was made for.
    """
    limit = model.decoder.max_position_embeddings
    if config.max_length is not None and config.max_length > limit:
        raise ConfigError(f"max_length={config.max_length}: expected at most {limit}, the model's length")
    return config.max_length or limit


def _choose_prepack(config: RuntimeConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    if not can_prepack(dtype):
        return False
    if config.prepack is not None:
        return config.prepack
    return sum(weight.nbytes for weight in weights.values()) < free_memory() // 3
