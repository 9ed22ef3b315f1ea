"""Engine directory -> the parts that run it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dpn_rt.backends.kernels.gpu import open_cuda
from dpn_rt.backends.kernels.loading import copy_weights, load_kernel_backend, may_copy
from dpn_rt.backends.tensorrt import cuda
from dpn_rt.backends.tensorrt.loading import load_plan_backend
from dpn_rt.cache.image_cache import ImageCache
from dpn_rt.device.device import Device
from dpn_rt.device.free_memory import free_memory
from dpn_rt.device.freed_memory import give_back_freed_memory
from dpn_rt.device.host import HostDevice
from dpn_rt.device.huge_pages import has_huge_pages
from dpn_rt.engine.detokenizer import Detokenizer
from dpn_rt.engine.engine import Engine
from dpn_rt.engine.images import ImageRows
from dpn_rt.engine.prefix_cache import PrefixCache
from dpn_rt.engine.runner import Runner
from dpn_rt.engine.scheduler import Scheduler
from dpn_rt.errors import ConfigError
from dpn_rt.format.checks import check_model
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.format.given_weights import collect_weights
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.reduction.spec import Spec, parse_spec
from dpn_rt.model.weights.dense import can_prepack
from dpn_rt.ops.isa import cpu_isa
from dpn_rt.prompts.processor import Processor
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.sampling.sampler import Sampler
from dpn_rt.schema.dtypes import Quantize
from dpn_rt.schema.text import shown
from dpn_rt.schema.weights import TORCH_DTYPES
from dpn_rt.settings import EngineOptions, EngineSettings, resolve

log = logging.getLogger("dpn_rt.engine")

CPU_DTYPES = ("float32", "bfloat16")
GPU_FORMS: tuple[Quantize, ...] = ("none", "int8", "fp8")
"""Of weights that products on a GPU take."""


def check_device(device: str, model: ModelConfig, has_plans: bool) -> None:
    """Refuse a device that is unknown or cannot run an engine of `model`, with or without TensorRT plans.

    Raises:
        ConfigError: naming what would work.
    """
    if has_plans:
        if device not in ("auto", "cuda"):
            raise ConfigError(f"device={shown(device)}: expected 'auto' or 'cuda', TensorRT plans run on GPUs alone")
        return
    if device == "cuda" and model.quantize not in GPU_FORMS:
        raise ConfigError(
            f"device='cuda': the engine's weights are {model.quantize}, which runs on the CPU alone, expected one of "
            f"{', '.join(GPU_FORMS)}: build it again with another --quantize, or use device='cpu'"
        )
    if device == "cuda":
        return  # `open_cuda` knows what else a GPU takes
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device={shown(device)}: expected 'auto', 'cpu' or 'cuda'")
    cpu_isa()  # DPN_RT_CPU_ISA may have none of its values
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


def load_engine(path: str | Path, device: str, options: EngineOptions, *, verify: bool = True) -> LoadedEngine:
    """An engine directory, loaded.

    Args:
        path: as `python -m dpn_rt.build` made it.
        device: "cpu" or "cuda"; "auto" is the CPU, and the GPU for an engine with plans.
        options: limits.
        verify: compare the files' sha256 with the engine's record before use.

    Raises:
        EngineError: the engine is incomplete, damaged, or of an unknown format.
        ConfigError: device or a limit cannot be served.
    """
    opened = _open(path, device, options, verify)
    processor = _processor(opened)
    engine = _engine(opened, load_runner(opened, device), processor.tokenizer, only_stops=False)
    return LoadedEngine(opened.model, processor, engine)


def load_engine_of_weights(
    model: ModelConfig, weights: Iterable[tuple[str, Tensor]], device: str, options: EngineOptions
) -> LoadedEngine:
    """A model with given weights, without an engine directory; it takes token ids and image embeddings or pixels.

    Args:
        model: the configuration; without a tokenizer and an image processor, which would be files.
        weights: (canonical name, tensor) of `weight_spec(model)`, in any order. A tensor that is on the device already
            is used where it is.
        device: as `load_engine` takes it.
        options: limits.

    Raises:
        EngineError: weights are missing, unknown, or of the wrong shape or dtype; or the model needs files.
        ConfigError: as `load_engine`; or the decoder is to be shared by several processes.
    """
    check_model(model)
    check_device(device, model, has_plans=False)
    if options.tensor_parallel_size > 1:
        raise ConfigError(
            f"tensor_parallel_size={options.tensor_parallel_size}: expected 1, ranks read their weights from an "
            "engine directory"
        )
    reduced = with_reductions(model, options.reduce, has_plans=False)
    opened = OpenedEngine(None, reduced, resolve(reduced, options, None))
    processor = _processor(opened)
    runner = _kernel_runner(opened, collect_weights(model, weights), device)
    return LoadedEngine(reduced, processor, _engine(opened, runner, None, only_stops=False))


def load_bare_engine(path: str | Path, device: str, options: EngineOptions, *, verify: bool = True) -> Engine:
    """An engine without what makes its prompts (`load_processor`), which is another process's affair.

    It makes text only for requests with stop strings, which need it to end; that of the others is made of their ids.

    Raises:
        EngineError, ConfigError: as `load_engine`, whose arguments it takes.
    """
    opened = _open(path, device, options, verify)
    has_tokenizer = opened.model.prompt.has_tokenizer
    tokenizer = Tokenizer.load(opened.files.processor_path) if has_tokenizer else None
    return _engine(opened, load_runner(opened, device), tokenizer, only_stops=True)


def load_processor(path: str | Path, device: str, options: EngineOptions, *, verify: bool = True) -> Processor:
    """What makes an engine's prompts, without its weights.

    Raises:
        EngineError, ConfigError: as `load_engine`, whose arguments it takes.
    """
    return _processor(_open(path, device, options, verify))


@dataclass(frozen=True)
class OpenedEngine:
    """An engine directory, and how it is to be run."""

    directory: EngineDir | None
    """None where the weights are given."""
    model: ModelConfig
    """With the reductions that were asked for."""
    settings: EngineSettings

    @property
    def files(self) -> EngineDir:
        """The engine directory, of an engine that has one."""
        assert self.directory is not None, "an engine of given weights has no files"
        return self.directory


def _open(path: str | Path, device: str, options: EngineOptions, verify: bool) -> OpenedEngine:
    """An engine that the device can run, and the settings that it runs with."""
    if not isinstance(verify, bool):
        raise ConfigError(f"verify={shown(verify)}: expected True or False")
    directory = EngineDir.open(path, verify=verify)
    check_device(device, directory.model, directory.plans is not None)
    model = with_reductions(directory.model, options.reduce, directory.plans is not None)
    plans = None if directory.plans is None else directory.plans.limits
    return OpenedEngine(directory, model, resolve(model, options, plans))


def with_reductions(model: ModelConfig, reduce: Spec | Sequence[Spec] | None, has_plans: bool) -> ModelConfig:
    """The model with boundaries for several training-free reductions, of which the first is the default.

    Args:
        model: of an engine.
        reduce: one SPEC or several; None: the engine's own reduction.
        has_plans: whether TensorRT plans run the stages, which they were built for.

    Raises:
        ConfigError: a SPEC is wrong, or the engine cannot run it.
    """
    if reduce is None:
        return model
    if not isinstance(reduce, str | Mapping | Iterable):
        raise ConfigError(f"reduce={shown(reduce)}: expected a SPEC such as 'fastv:k=2,ratio=0.5', or a list of them")
    specs = [reduce] if isinstance(reduce, str | Mapping) else list(reduce)
    if not specs:
        raise ConfigError("reduce=[]: expected at least one SPEC, 'none' for no reduction")
    chains = [parse_spec(spec, model.decoder.num_layers) for spec in specs]
    if isinstance(model.reduction, PoolingConfig):
        if any(chain.steps for chain in chains):
            raise ConfigError(f"reduce={specs}: the model has a trained reduction of its own, expected 'none'")
        return replace(model, reduction=NoReduction())
    boundaries = tuple(sorted({layer for chain in chains for layer in chain.boundaries}))
    if has_plans and boundaries:
        raise ConfigError(f"reduce={specs}: TensorRT plans have no boundaries for it, expected 'none'")
    reduced = replace(model, reduction=replace(chains[0], boundaries=boundaries))
    check_model(reduced)
    return reduced


def _processor(opened: OpenedEngine) -> Processor:
    return Processor(
        None if opened.directory is None else opened.directory.processor_path,
        opened.model,
        max_model_len=opened.settings.max_model_len,
        max_pixels=opened.settings.max_image_pixels,
        max_images=opened.settings.max_images,
        keys_of_embeds=opened.settings.reuse_bytes > 0,
    )


def _engine(opened: OpenedEngine, runner: Runner, tokenizer: Tokenizer | None, *, only_stops: bool) -> Engine:
    model, settings = opened.model, opened.settings

    def make_detokenizer(params: SamplingParams) -> Detokenizer | None:
        is_needed = params.stop_strings or not only_stops
        return Detokenizer(tokenizer, params) if tokenizer is not None and is_needed else None

    return Engine(
        model,
        settings,
        Scheduler(settings, model.reduction, runner.cache),
        runner,
        Sampler(None if tokenizer is None else tokenizer.token_text),
        None if tokenizer is None else make_detokenizer,
    )


def load_runner(opened: OpenedEngine, device: str) -> Runner:
    """The engine's parts with its weights in memory, and an empty KV cache.

    Raises:
        CapacityError: `kv_cache_bytes` holds not even one KV block, or the GPU has too little memory.
        ConfigError: the GPU cannot run the engine.
        PlanError: the engine's plans cannot be loaded on this machine.
    """
    engine = opened.files
    weights = engine.load_weights()
    if engine.plans is not None:
        reader = cuda.CudaPlanReader(engine.plans, opened.model)
        plans, encoder = load_plan_backend(engine, weights, reader)
        images = ImageRows(encoder, TORCH_DTYPES[opened.model.dtype], _image_cache(opened.settings))
        return Runner(plans, images)  # slots cannot be shared: no prefix cache
    return _kernel_runner(opened, weights, device)


def _kernel_runner(opened: OpenedEngine, weights: Mapping[str, Tensor], device: str) -> Runner:
    """The parts of an engine on the product's own kernels."""
    model, settings = opened.model, opened.settings
    dtype = TORCH_DTYPES[model.dtype]
    give_back_freed_memory()  # of an engine that was dropped: it counts as taken
    prepack = device != "cuda" and _choose_prepack(settings, weights, dtype)
    if settings.tensor_parallel_size > 1:
        # Imported here: one rank needs no torch.distributed.
        from dpn_rt.backends.parallel.start_ranks import load_parallel_backend

        backend, encoder = load_parallel_backend(opened.files, model, settings, device, prepack=prepack)
    else:
        host_or_gpu: Device = open_cuda(model) if device == "cuda" else HostDevice()
        if device != "cuda":
            copied = _copied(opened, weights, prepack=prepack)
            log.info("weights are %s", "copied into huge pages" if copied is not weights else "used where they are")
            weights = copied
        backend, encoder = load_kernel_backend(model, weights, settings, host_or_gpu, prepack=prepack)
    prefixes = PrefixCache(backend.cache, settings.reuse_bytes) if settings.reuse_bytes else None
    return Runner(backend, ImageRows(encoder, dtype, _image_cache(settings)), prefixes)


def _image_cache(settings: EngineSettings) -> ImageCache | None:
    return ImageCache(settings.reuse_bytes) if settings.reuse_bytes else None


def _choose_prepack(settings: EngineSettings, weights: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    if not can_prepack(dtype):
        return False
    if settings.prepack_weights is not None:
        return settings.prepack_weights
    sizes = (
        weight.numel() * max(weight.itemsize, dtype.itemsize * weight.is_floating_point())
        for weight in weights.values()
    )
    return sum(sizes) < free_memory() // 3


def _copied(opened: OpenedEngine, weights: Mapping[str, Tensor], *, prepack: bool) -> Mapping[str, Tensor]:
    """The weights, copied into huge pages where that was asked for or is worth its memory; see `EngineOptions`.

    Raises:
        CapacityError: a copy was asked for, and there is no room for it.
    """
    if not may_copy(opened.model, opened.settings):
        return weights
    asked = opened.settings.copy_weights
    num_bytes = sum(weight.nbytes for weight in weights.values())
    if asked is None:
        # Weights that are given may be in use elsewhere, and would then be in memory twice.
        rest = free_memory() - num_bytes * prepack
        if opened.directory is None or not has_huge_pages() or num_bytes >= rest // 2:
            return weights
    tensors = dict(weights)
    copies = copy_weights(tensors, required=asked is True)
    return weights if copies is tensors else copies
