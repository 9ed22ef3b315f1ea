"""The executor of rank 0: every call goes to the other ranks first, then to its own part."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dpn_rt.backends.kernels.executor import DecodeInputs, NextLayerInputs, ScoredRows
from dpn_rt.backends.parallel.calls import Call
from dpn_rt.backends.parallel.group import ProcessRankGroup
from dpn_rt.backends.parallel.part import RankExecutor
from dpn_rt.backends.parallel.processes import RankProcesses
from dpn_rt.cache.block_allocator import BlockIds
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.errors import DeviceError
from dpn_rt.model.decoder import Decoder
from dpn_rt.model.stage_batch import StageBatch


class ParallelExecutor:
    """An `Executor` on all ranks.

    The others are told of nothing but calls: reducers, scheduling and sampling are rank 0's alone, so no rank can take
    another route. After a call that failed, ranks may be out of step: the executor has ended then.
    """

    def __init__(
        self, local: RankExecutor, group: ProcessRankGroup, ranks: RankProcesses, on_close: Callable[[], object]
    ) -> None:
        """
        Args:
            local: of rank 0's part.
            group: of all ranks.
            ranks: the other ones.
            on_close: called once, when the ranks end.
        """
        self._local, self._group, self._ranks = local, group, ranks
        self._failure: DeviceError | None = None
        self.close = weakref.finalize(self, _close, ranks, on_close)

    @property
    def process_ids(self) -> list[int]:
        """Of ranks 1 and up."""
        return self._ranks.process_ids

    @property
    def decoder(self) -> Decoder:
        """Rank 0's part."""
        return self._local.decoder

    @property
    def pool(self) -> KvPool:
        """Rank 0's part."""
        return self._local.pool

    def encode(self, *views: Tensor) -> Tensor:
        """See `CropEncoder.forward`, where all ranks share the vision encoder."""
        rows: Tensor = self._call("encode", *views)
        return rows

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `Executor`."""
        rows: Tensor = self._call("embed", token_ids)
        return rows

    def run(self, stage: int, x: Tensor, batch: StageBatch) -> Tensor:
        """See `Executor`."""
        rows: Tensor = self._call("run", stage, x, batch)
        return rows

    def logits(self, x: Tensor) -> Tensor:
        """See `Executor`."""
        logits: Tensor = self._call("logits", x)
        return logits

    def decode(self, token_ids: Tensor, inputs: DecodeInputs) -> Tensor:
        """See `Executor`."""
        logits: Tensor = self._call("decode", token_ids, inputs)
        return logits

    def cached_scores(
        self, stage: int, queries: Tensor, block_table: Tensor, kv_lengths: Tensor, scored: ScoredRows
    ) -> Tensor:
        """See `Executor`."""
        scores: Tensor = self._call("cached_scores", stage, queries, block_table, kv_lengths, scored)
        return scores

    def next_scores(
        self, stage: int, rows: Tensor, inputs: NextLayerInputs, scored: ScoredRows
    ) -> tuple[Tensor, Tensor | None]:
        """See `Executor`."""
        scores, keys = self._call("next_scores", stage, rows, inputs, scored)
        return scores, keys

    def copy_blocks(self, sources: BlockIds, targets: BlockIds) -> None:
        """See `Executor`."""
        self._call("copy_blocks", sources, targets)

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._failure is not None:
            raise DeviceError(str(self._failure)) from self._failure
        if not self.close.alive:
            raise DeviceError("the engine was closed: expected no more requests")
        try:
            call, tensors = Call.of(method, arguments)
            self._ranks.send(call)
            if call.packing.num_bytes:
                self._group.broadcast(call.filled_block(tensors))
            return getattr(self._local, method)(*arguments)
        except Exception as error:
            self._failure = error if isinstance(error, DeviceError) else self._ranks.failure(error)
            self.close()
            raise self._failure from error


def _close(ranks: RankProcesses, on_close: Callable[[], object]) -> None:
    ranks.end()
    on_close()
