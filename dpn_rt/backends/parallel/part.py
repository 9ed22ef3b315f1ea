"""One rank's part of a decoder, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dpn_rt.backends.kernels.executor import LocalExecutor
from dpn_rt.backends.kernels.gpu import open_cuda
from dpn_rt.backends.kernels.loading import load_decoder, place_weights, pool_bytes
from dpn_rt.backends.parallel.group import ProcessRankGroup
from dpn_rt.backends.parallel.messages import RankSource, fingerprint
from dpn_rt.cache.kv_pool import KvGeometry, KvPool
from dpn_rt.device.device import Device
from dpn_rt.device.host import HostDevice
from dpn_rt.errors import EngineError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.decoder import Decoder
from dpn_rt.model.shards import Shard
from dpn_rt.model.vision.encoder import CropEncoder
from dpn_rt.settings import EngineSettings
from dpn_rt.tuning.cpu_choices import cpu_choices


@dataclass(frozen=True, eq=False)
class RankPart:
    """The decoder of a rank, its weights, and the shape of its KV blocks."""

    decoder: Decoder
    weights: Mapping[str, Tensor]
    """Of the part, by canonical name; on rank 0 those that are not the decoder's too."""
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
        shard, group = Shard(model.decoder, model.quantize, rank, size), ProcessRankGroup(rank, size)
        own = place_weights(shard.tensors(weights), device)
        if device.torch_device.type == "cpu":
            cpu_choices()
        decoder, geometry = load_decoder(
            model,
            shard.config,
            own,
            settings,
            device,
            prepack=prepack,
            group=group,
            splits_head=shard.splits_head,
        )
        return cls(decoder, own, geometry, group, device, settings.block_size)

    @classmethod
    def load_other(cls, source: RankSource) -> RankPart:
        """The part of a rank after rank 0.

        Raises:
            EngineError: the files are not those that rank 0 has loaded.
            CapacityError, ConfigError: as `load` and `open_cuda`.
        """
        if fingerprint(source.path) != source.fingerprint:
            raise EngineError(
                f"{source.path}: its engine.json or the header of its weights differs from what rank 0 has loaded: "
                "expected the same engine on every rank, was it built again meanwhile?"
            )
        weights = EngineDir.open(source.path, verify=False).load_weights()
        device: Device = open_cuda(source.model, source.rank) if source.device == "cuda" else HostDevice()
        return cls.load(source.model, weights, source.settings, device, source.rank, prepack=source.prepack)

    def pool_bytes(self, model: ModelConfig, encoder: CropEncoder | None, settings: EngineSettings) -> int:
        """Bytes for the KV pool of the rank. On a GPU all ranks compute the largest prefill for it, at the same time.

        Raises:
            CapacityError: nothing is left for a pool.
        """
        num_bytes = pool_bytes(model, self.decoder, encoder, self.geometry, settings, self.device)
        shares_memory = settings.kv_cache_bytes is None and not self.device.is_async
        return num_bytes // settings.tensor_parallel_size if shares_memory else num_bytes

    def executor(self, num_blocks: int) -> LocalExecutor:
        """The executor of the part, with KV blocks.

        Raises:
            CapacityError: the device has no memory for them.
        """
        return LocalExecutor(self.decoder, KvPool(self.geometry, num_blocks, self.block_size, self.device), self.device)
