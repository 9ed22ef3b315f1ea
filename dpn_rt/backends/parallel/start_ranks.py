"""An engine directory -> the backend of rank 0, and the processes of the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from dpn_rt.backends.kernels.backend import KernelBackend
from dpn_rt.backends.kernels.decode_step import PlainDecodeStep
from dpn_rt.backends.kernels.gpu import open_cuda
from dpn_rt.backends.kernels.loading import image_encoder, make_allocator, num_pool_blocks
from dpn_rt.backends.kernels.stages import PlainStages
from dpn_rt.backends.parallel.encoder import ParallelEncoder
from dpn_rt.backends.parallel.messages import AllLoaded, PoolSize, RankSource
from dpn_rt.backends.parallel.parallel_executor import ParallelExecutor
from dpn_rt.backends.parallel.part import RankPart
from dpn_rt.backends.parallel.processes import RankProcesses
from dpn_rt.device.device import Device
from dpn_rt.device.host import HostDevice
from dpn_rt.errors import EngineError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.reduction.loading import load_reducers
from dpn_rt.model.vision.encoder import VisionEncoder
from dpn_rt.settings import EngineSettings


def load_parallel_backend(
    engine: EngineDir, model: ModelConfig, settings: EngineSettings, device: str, *, prepack: bool
) -> tuple[KernelBackend, VisionEncoder | None]:
    """Starts the other ranks, and loads rank 0's part while they load theirs.

    Each takes its share of the processor: of torch's threads in this process, which has fewer until the backend is
    closed.

    Args:
        engine: whose weights are loaded.
        model: the engine's configuration, with the reductions that were asked for.
        settings: the engine's limits, `tensor_parallel_size` among them.
        device: cpu or cuda.
        prepack: see `load_kernel_backend`.

    Returns:
        As `load_kernel_backend`.

    Raises:
        EngineError: a rank cannot load its part, or has other files.
        CapacityError, ConfigError: as `load_kernel_backend` and `open_cuda`, on any rank.
    """
    size, num_threads = settings.tensor_parallel_size, torch.get_num_threads()
    share = max(1, num_threads // size)
    ranks = RankProcesses(size)
    end: Callable[[], object] = partial(_end, ranks, num_threads)
    try:
        sources = [
            RankSource(
                replace(engine, path=engine.path.absolute()),
                model,
                settings,
                device,
                rank,
                ranks.store,
                share,
                prepack,
            )
            for rank in range(1, size)
        ]
        ranks.send_sources(sources)
        torch.set_num_threads(share)
        own: Device = open_cuda(model, 0) if device == "cuda" else HostDevice()
        part = RankPart.load(model, engine.load_weights(), settings, own, 0, prepack=prepack)
        ranks.wait_until_loaded()
        ranks.send(AllLoaded())
        try:
            part.group.connect(ranks.store, own.torch_device)
        except RuntimeError as error:
            raise EngineError(f"the {size} ranks of {engine.path} cannot reach each other: {error!r:.500}") from error
        num_blocks = num_pool_blocks(part.geometry, settings, part.pool_bytes(model, settings))
        ranks.send(PoolSize(num_blocks))
        local = part.executor(num_blocks)
        ranks.wait_until_loaded()
        executor = ParallelExecutor(local, part.group, ranks, partial(torch.set_num_threads, num_threads))
        end = executor.close  # it does the same, and would do it again when it is collected
        cache = make_allocator(executor, part.geometry, settings)
        reducers = load_reducers(model.reduction, part.weights, own)
        step = PlainDecodeStep(executor, cache, own)
        backend = KernelBackend(executor, reducers, cache, PlainStages(executor), step, own)
        if part.encoder is not None and part.shares_encoder:
            return backend, ParallelEncoder(part.encoder, executor, own)
        return backend, image_encoder(part.encoder, own)
    except BaseException:
        end()
        raise


def _end(ranks: RankProcesses, num_threads: int) -> None:
    ranks.end()
    torch.set_num_threads(num_threads)
