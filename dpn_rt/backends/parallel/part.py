"""One rank's part of a model, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dpn_rt.backends.kernels.gpu import open_cuda
from dpn_rt.backends.kernels.loading import copy_weights, load_decoder, may_copy, place_weights, pool_bytes
from dpn_rt.backends.kernels.local_executor import LocalExecutor
from dpn_rt.backends.parallel.group import ProcessRankGroup
from dpn_rt.backends.parallel.messages import RankSource
from dpn_rt.cache.kv_pool import KvGeometry, KvPool
from dpn_rt.device.device import Device
from dpn_rt.device.free_memory import free_memory
from dpn_rt.device.freed_memory import keep_freed_memory
from dpn_rt.device.host import HostDevice
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.decoder import Decoder
from dpn_rt.model.shards import Shard
from dpn_rt.model.vision.encoder import CropEncoder, encoder_pairs, load_encoder
from dpn_rt.schema.weights import TORCH_DTYPES
from dpn_rt.settings import EngineSettings
from dpn_rt.tuning.cpu_choices import cpu_choices


@dataclass(frozen=True, eq=False)
class RankPart:
    """A rank's decoder and vision encoder, its weights, and the shape of its KV blocks."""

    decoder: Decoder
    encoder: CropEncoder | None
    """All ranks have a part of it, or rank 0 has it whole."""
    shares_encoder: bool
    weights: Mapping[str, Tensor]
    """Of the part, by canonical name; rank 0 has those of the reducers too."""
    geometry: KvGeometry
    group: ProcessRankGroup
    device: Device
    block_size: int

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        weights: Mapping[str, Tensor],
        settings: EngineSettings,
        device: Device,
        rank: int,
        *,
        prepack: bool,
    ) -> RankPart:
        """A rank's part, whose group is not connected yet.

        Args:
            model: of the engine.
            weights: of the engine, by canonical name.
            settings: the engine's limits.
            device: of the rank.
            rank: from 0.
            prepack: see `load_kernel_backend`.

        Raises:
            CapacityError: the device has too little memory.
        """
        size = settings.tensor_parallel_size
        pairs = encoder_pairs(model.vision, model.projector, model.decoder.hidden_size)
        shares_encoder = bool(pairs) and all(pair.divides(model.quantize, size) for pair in pairs)
        shard = Shard(model.decoder, rank, size, pairs if shares_encoder else ())
        group = ProcessRankGroup(rank, size)
        tensors = shard.tensors(weights)
        on_host = device.torch_device.type == "cpu"
        if on_host:
            cpu_choices()
            if may_copy(model, settings):  # these are copies already, but in small pages
                tensors = copy_weights(tensors, required=settings.copy_weights is True)
        own = place_weights(tensors, device, TORCH_DTYPES[model.dtype])
        decoder, geometry = load_decoder(model, shard.config, own, settings, device, prepack=prepack, group=group)
        encoder = None
        if shares_encoder:
            encoder = load_encoder(model.vision, model.projector, own, prepack=prepack, group=group)
        elif rank == 0:
            encoder = load_encoder(model.vision, model.projector, own, prepack=prepack)
        if on_host:
            keep_freed_memory(free_memory() // 8 // size)
        return cls(decoder, encoder, shares_encoder, own, geometry, group, device, settings.block_size)

    @classmethod
    def load_other(cls, source: RankSource) -> RankPart:
        """The part of a rank after rank 0.

        Raises:
            EngineError: the weights are not those that rank 0 has opened.
            CapacityError, ConfigError: as `load` and `open_cuda`.
        """
        weights = source.engine.load_weights()
        device: Device = open_cuda(source.model, source.rank) if source.device == "cuda" else HostDevice()
        return cls.load(source.model, weights, source.settings, device, source.rank, prepack=source.prepack)

    def pool_bytes(self, model: ModelConfig, settings: EngineSettings) -> int:
        """Bytes for the KV pool of the rank. On a GPU all ranks compute the largest prefill for it, at the same time.

        Raises:
            CapacityError: nothing is left for a pool.
        """
        num_bytes = pool_bytes(model, self.decoder, self.encoder, self.geometry, settings, self.device)
        shares_memory = settings.kv_cache_bytes is None and not self.device.is_async
        return num_bytes // settings.tensor_parallel_size if shares_memory else num_bytes

    def executor(self, num_blocks: int) -> RankExecutor:
        """The executor of the part, with KV blocks.

        Raises:
            CapacityError: the device has no memory for them.
        """
        pool = KvPool(self.geometry, num_blocks, self.block_size, self.device)
        return RankExecutor(self.decoder, pool, self.device, self.encoder if self.shares_encoder else None)


class RankExecutor(LocalExecutor):
    """A rank's part of every call."""

    def __init__(self, decoder: Decoder, pool: KvPool, device: Device, encoder: CropEncoder | None) -> None:
        """`encoder`: None where rank 0 calls it by itself, or there is none."""
        super().__init__(decoder, pool, device)
        self._encoder = encoder

    def encode(self, *views: Tensor) -> Tensor:
        """See `CropEncoder.forward`."""
        assert self._encoder is not None, "rank 0 has the encoder"
        return self._encoder.forward(views)
