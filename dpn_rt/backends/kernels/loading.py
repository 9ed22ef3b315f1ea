"""Loads an engine's weights onto a device and makes the backend and the vision encoder that run there."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from dpn_rt.backends.kernels.backend import DecodeStep, KernelBackend, stages_with_queries
from dpn_rt.backends.kernels.decode_graphs import DecodeGraphs
from dpn_rt.backends.kernels.encoder_graphs import EncoderGraphs
from dpn_rt.backends.kernels.executor import Executor
from dpn_rt.backends.kernels.host_decode_graphs import HostDecodeGraphs
from dpn_rt.backends.kernels.local_executor import LocalExecutor
from dpn_rt.backends.kernels.stage_graphs import StageGraphs
from dpn_rt.backends.kernels.stages import PlainStages, Stages
from dpn_rt.cache.block_allocator import AllocatorConfig, BlockAllocator, count_blocks
from dpn_rt.cache.kv_pool import KvGeometry, KvPool
from dpn_rt.device.device import Device
from dpn_rt.device.free_memory import free_memory
from dpn_rt.device.freed_memory import keep_freed_memory
from dpn_rt.device.huge_pages import gather
from dpn_rt.errors import CapacityError, ConfigError
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.decoder import Decoder
from dpn_rt.model.ranks import RankGroup
from dpn_rt.model.reduction.loading import load_reducers
from dpn_rt.model.rope import rope_table
from dpn_rt.model.stage_batch import StageBatch
from dpn_rt.model.vision.encoder import CropEncoder, ImageEncoder, VisionEncoder, load_encoder
from dpn_rt.model.weights.forms import place
from dpn_rt.schema.weights import TORCH_DTYPES
from dpn_rt.settings import EngineSettings
from dpn_rt.tuning.cpu_choices import cpu_choices

log = logging.getLogger("dpn_rt.engine")

ANGLE_COPIES = 3
"""Of the table of rotary angles, while it is made."""
GPU_BLOCK_BYTES = 2**31
"""A KV block takes less on a GPU: its kernels multiply the number of a block by its bytes with factors of 32 bits."""


def load_kernel_backend(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    settings: EngineSettings,
    device: Device,
    *,
    prepack: bool = False,
) -> tuple[KernelBackend, VisionEncoder | None]:
    """Load weights, KV pool and decode step onto a device.

    Args:
        model: the engine's configuration.
        weights: canonical name -> tensor, on the CPU.
        settings: the engine's limits.
        device: of all tensors.
        prepack: keep a second copy of the weights in oneDNN's layout, on the host.

    Returns:
        The backend, and the vision encoder; None for a model without one.

    Raises:
        CapacityError: the device has too little memory; says how much is needed and what to lower.
    """
    placed = place_weights(weights, device, TORCH_DTYPES[model.dtype])
    on_host = device.torch_device.type == "cpu"
    if on_host:
        cpu_choices()  # also where no weight is dense
    try:
        loaded = _build(model, placed, settings, device, prepack=prepack)
        if on_host:
            keep_freed_memory(free_memory() // 8)  # from here on: an engine's weights are given back with the engine
        return loaded
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{device.torch_device} ran out of memory while the largest prefill of {settings.max_prefill_tokens} rows "
            f"was tried or graphs were recorded, after {_num_bytes(weights):,} bytes of weights: lower "
            f"max_num_batched_tokens, max_num_seqs or "
            f"gpu_memory_utilization={settings.gpu_memory_utilization} ({error})"
        ) from error


def may_copy(model: ModelConfig, settings: EngineSettings) -> bool:
    """Whether weights on the CPU may be copied into huge pages: not 8-bit floats, which become bfloat16 in memory."""
    return settings.copy_weights is not False and model.quantize != "fp8"


def copy_weights(weights: dict[str, Tensor], *, required: bool) -> dict[str, Tensor]:
    """Canonical name -> a copy in huge pages, all of them on the CPU; see `gather`.

    Raises:
        CapacityError: there is no room for copies that are required.
    """
    num_bytes, free = _num_bytes(weights), free_memory()
    try:
        if required and num_bytes > free:
            raise MemoryError(f"{free:,} bytes are free")
        return gather(weights, required=required)
    except MemoryError as error:
        raise CapacityError(
            f"copy_weights=True: the memory has no room for a copy of {num_bytes:,} bytes of weights ({error}); "
            "expected None or False, which can do without"
        ) from error


def place_weights(weights: Mapping[str, Tensor], device: Device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Canonical name -> the weight on a device, as its products take it. One that is there already so is not copied.

    Args:
        weights: of the engine, or of one rank's part.
        device: of the products.
        dtype: of the activations.

    Raises:
        CapacityError: the weights do not fit.
    """
    try:
        return {
            name: place(weights, name, device.torch_device, row_major=device.row_major, dtype=dtype) for name in weights
        }
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{device.torch_device} has no room for {_num_bytes(weights):,} bytes of weights: end what else runs "
            f"there, or use a GPU with more memory ({error})"
        ) from error


def _build(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    settings: EngineSettings,
    device: Device,
    *,
    prepack: bool,
) -> tuple[KernelBackend, VisionEncoder | None]:
    decoder, geometry = load_decoder(model, model.decoder, weights, settings, device, prepack=prepack)
    encoder = load_encoder(model.vision, model.projector, weights, prepack=prepack)
    num_bytes = pool_bytes(model, decoder, encoder, geometry, settings, device)
    pool = KvPool(geometry, num_pool_blocks(geometry, settings, num_bytes), settings.block_size, device)
    executor = LocalExecutor(decoder, pool, device)
    cache = make_allocator(executor, geometry, settings)
    reducers = load_reducers(model.reduction, weights, device)
    step: DecodeStep
    stages: Stages = PlainStages(executor)
    if device.is_async:
        gc.collect()  # what loading has left: the collector is off while graphs are recorded
        # Decode steps come first: what they give must not lie where a stage computes.
        step = DecodeGraphs(decoder, cache, pool, device, settings.max_num_seqs)
        graph_rows = min(settings.max_graph_rows, settings.max_prefill_tokens)
        if graph_rows and not geometry.has_windows:
            stages = StageGraphs(executor, cache, device, graph_rows, stages_with_queries(reducers))
    else:
        step = HostDecodeGraphs(executor, cache, device, settings.max_num_seqs)
    backend = KernelBackend(executor, reducers, cache, stages, step, device)
    return backend, image_encoder(encoder, device)


def load_decoder(
    model: ModelConfig,
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    settings: EngineSettings,
    device: Device,
    *,
    prepack: bool,
    group: RankGroup | None = None,
) -> tuple[Decoder, KvGeometry]:
    """A decoder, and the shape of its KV blocks.

    Args:
        model: of the engine.
        config: of its decoder, or of one rank's part.
        weights: on `device`, of the engine or of one rank's part.
        settings: the engine's limits.
        device: of all tensors.
        prepack: see `load_kernel_backend`.
        group: see `Decoder`.
    """
    config = config.for_length(settings.max_model_len)
    geometry = KvGeometry.of_model(config, model.stage_layers, TORCH_DTYPES[model.dtype])
    check_length(settings, config.head_dim, sum(geometry.layer_groups))
    if device.torch_device.type != "cpu":
        check_block(settings.block_size, geometry)
    angles = rope_table(config, settings.max_model_len).to(device.torch_device)
    decoder = Decoder(
        config,
        model.stage_layers,
        weights,
        angles,
        geometry.layers_per_block,
        prepack=prepack,
        group=group,
    )
    return decoder, geometry


def pool_bytes(
    model: ModelConfig,
    decoder: Decoder,
    encoder: CropEncoder | None,
    geometry: KvGeometry,
    settings: EngineSettings,
    device: Device,
) -> int:
    """Bytes for the KV pool of a device: what the user gave, or what it has room for."""
    if settings.kv_cache_bytes is not None:
        return settings.kv_cache_bytes
    with torch.inference_mode():
        peak = device.peak_bytes(lambda: _largest_work(model, decoder, encoder, geometry, settings, device))
    return device.cache_bytes(settings.gpu_memory_utilization, peak + _kept_bytes(model, settings))


def check_length(settings: EngineSettings, head_dim: int, num_groups: int) -> None:
    """Refuse a length whose tables alone take more than the host's free memory, before they are made.

    Args:
        settings: the engine's limits.
        head_dim: of the decoder, whose rotary angles are in a table of their own.
        num_groups: layer groups, each with a block table.

    Raises:
        CapacityError: with what is needed and what is free.
    """
    length = settings.max_model_len
    angles = ANGLE_COPIES * 4 * length * head_dim
    # And those that decode steps read.
    tables = 2 * 4 * num_groups * (settings.max_num_seqs + 1) * -(-length // settings.block_size)
    if angles + tables > (free := free_memory()):
        raise CapacityError(
            f"max_model_len={length:,}: rotary angles and block tables take {angles + tables:,} bytes, {free:,} are "
            f"free: lower max_model_len, or max_num_seqs={settings.max_num_seqs}"
        )


def check_block(block_size: int, geometry: KvGeometry) -> None:
    """Refuse KV blocks that are too large for the kernels of GPUs.

    Raises:
        ConfigError: with the largest size.
    """
    num_bytes, of_row = geometry.block_bytes(block_size), geometry.block_bytes(1)
    if num_bytes >= GPU_BLOCK_BYTES:
        raise ConfigError(
            f"block_size={block_size:,}: a KV block of this model takes {num_bytes:,} bytes, and a GPU's less than "
            f"{GPU_BLOCK_BYTES:,}: expected a block_size of at most {(GPU_BLOCK_BYTES - 1) // of_row:,}"
        )


def image_encoder(encoder: CropEncoder | None, device: Device) -> VisionEncoder | None:
    """The encoder as it runs on `device`, with graphs where the device is asynchronous; None without an encoder."""
    if encoder is None:
        return None
    return EncoderGraphs(encoder, device) if device.is_async else ImageEncoder(encoder)


def num_pool_blocks(geometry: KvGeometry, settings: EngineSettings, num_bytes: int) -> int:
    """KV blocks of a pool: as many as fit in `num_bytes`.

    Where the user gave no `kv_cache_bytes`, there are no more than `max_num_seqs` sequences of full length need.

    Args:
        geometry: shape of the model's KV blocks.
        settings: the engine's limits.
        num_bytes: of memory for the pool.

    Raises:
        CapacityError: `num_bytes` is less than one block.
    """
    block_size, groups = settings.block_size, geometry.layer_groups
    block_bytes = geometry.block_bytes(block_size)
    num_blocks = num_bytes // block_bytes
    full_length = count_blocks([settings.max_model_len] * len(groups), groups, block_size)
    if settings.kv_cache_bytes is None:
        num_blocks = min(settings.max_num_seqs * full_length, num_blocks)
    if num_blocks < 1:
        raise CapacityError(
            f"kv_cache_bytes={num_bytes}: expected at least {block_bytes}, one KV block (block_size={block_size})"
        )
    if num_blocks < full_length:
        log.warning(
            "kv_cache_bytes=%d: requests that may become as long as max_model_len=%d are refused, expected %d bytes, "
            "or a smaller max_model_len",
            num_bytes,
            settings.max_model_len,
            full_length * block_bytes,
        )
    return num_blocks


def make_allocator(executor: Executor, geometry: KvGeometry, settings: EngineSettings) -> BlockAllocator:
    """The allocator of an executor's KV blocks, all of them free."""
    block_bytes, num_blocks = geometry.block_bytes(settings.block_size), executor.pool.num_blocks
    config = AllocatorConfig(
        num_blocks,
        settings.block_size,
        settings.max_num_seqs,
        settings.max_model_len,
        geometry.layer_groups,
        block_bytes,
    )
    return BlockAllocator(config, executor.copy_blocks)


def _largest_work(
    model: ModelConfig,
    decoder: Decoder,
    encoder: CropEncoder | None,
    geometry: KvGeometry,
    settings: EngineSettings,
    device: Device,
) -> None:
    """Run the work that takes the most memory: encode images, then prefill the most rows possible without pooling.

    The values of the rows do not matter, so all of them share the only KV block of a temporary pool.
    """
    where = device.torch_device
    if encoder is not None:
        shapes = encoder.config.view_shapes
        encoder.forward([torch.zeros(encoder.crops_per_call, *shape, device=where) for shape in shapes])
    rows = settings.max_prefill_tokens
    length = min(rows, settings.max_model_len)
    num_seqs = -(-rows // length)
    blocks = torch.zeros((1, *geometry.block_shape(settings.block_size)), dtype=geometry.dtype, device=where)
    key_positions = torch.zeros((1, settings.block_size), dtype=torch.int32, device=where)
    ends = torch.arange(1, num_seqs + 1, device=where).mul_(length).clamp_(max=rows)
    cu_seqlens = torch.cat((ends.new_zeros(1), ends)).int()
    width = -(-length // settings.block_size)
    x = torch.zeros(rows, model.decoder.hidden_size, dtype=geometry.dtype, device=where)
    for stage, groups in zip(decoder.stages, geometry.layer_groups, strict=True):
        positions = torch.arange(rows, dtype=torch.int32, device=where) % length
        batch = StageBatch(
            cu_seqlens=cu_seqlens,
            positions=positions,
            cache_rows=positions,
            context_lens=cu_seqlens[1:] - cu_seqlens[:-1],
            block_tables=torch.zeros(groups, num_seqs, width, dtype=torch.int32, device=where),
            last_rows=ends - 1,
        )
        x = stage.forward(x, batch, blocks, key_positions)
    decoder.logits(x)


def _kept_bytes(model: ModelConfig, settings: EngineSettings) -> int:
    """Bytes of rows that are kept in addition to KV blocks: rows of the running sequences' images, and reused rows."""
    of_prompt = 0 if model.vision is None else settings.max_images * model.vision.max_visual_tokens
    rows = settings.max_num_seqs * min(of_prompt, settings.max_model_len)
    return rows * model.decoder.hidden_size * TORCH_DTYPES[model.dtype].itemsize + 2 * settings.reuse_bytes


def _num_bytes(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.nbytes for weight in weights.values())
