"""The backend that runs TensorRT plans: a plan per stage on padded rows, and the product's boundaries between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Decoded, StagePreparer, StageRun
from dpn_rt.backends.tensorrt.padding import Padding, neighbours
from dpn_rt.backends.tensorrt.slots import SlotCache
from dpn_rt.backends.tensorrt.stage import PlanStage
from dpn_rt.cache.block_allocator import Slots
from dpn_rt.device.device import Device
from dpn_rt.model.layout import Chunk, IntArray
from dpn_rt.model.reduction.reducer import Reducer
from dpn_rt.model.rows import place_rows


class PlanBackend:
    """A `Backend`: the stages' plans, the boundaries between them, and the slots that they fill."""

    def __init__(
        self,
        embedding: Tensor,
        stages: Sequence[PlanStage],
        reducers: Sequence[Reducer],
        cache: SlotCache,
        device: Device,
    ) -> None:
        """
        Args:
            embedding: `[vocab_size, hidden_size]`; rows between plans have its dtype.
            stages: in order; one more than `reducers`.
            reducers: of the boundaries, on `device`.
            cache: the stages' slots.
            device: of all tensors.
        """
        self._embedding, self._device = embedding, device
        self._stages, self.reducers = stages, reducers
        self.cache = cache
        self.async_device: Device | None = None
        self.preparer: StagePreparer | None = None
        self.stage_sizes = [len(stage.spec.layers) for stage in stages]

    def embed(self, row_ids: npt.NDArray[np.int64], image_rows: Sequence[Tensor]) -> Tensor:
        """See `Backend.embed`."""
        token_ids, visual = self._device.upload(np.maximum(row_ids, 0), np.flatnonzero(row_ids < 0))
        return place_rows(self._embedding.index_select(0, token_ids), visual, image_rows)

    def run(self, stage: int, x: Tensor, keys: Tensor | None, chunk: Chunk, slots: Slots) -> StageRun:
        """See `Backend.run`. Sequences in consecutive slots go through the plan together.

        There are no scores, so there are no keys. The last stage returns logits `[num_seqs, vocab_size]`.
        """
        plan = self._stages[stage]
        groups = neighbours(slots, plan.spec.max_batch)
        padding = [Padding.of(chunk.cu_seqlens, group, self._device) for group in groups]
        lengths = chunk.context_lens
        positions = self._device.upload(chunk.positions)[0][:, None]
        results = [
            plan.prefill(each.pad(x), each.pad(positions).squeeze(2), lengths[group], int(slots[group[0]]))
            for each, group in zip(padding, groups, strict=True)
        ]
        if plan.spec.is_last:
            order = np.argsort(np.concatenate(groups))
            return StageRun(torch.cat(results).index_select(0, self._device.upload(order)[0]))
        for each, result in zip(padding, results, strict=True):
            each.unpad(result, x)
        return StageRun(x)

    def scores(self, stage: int, queries: Tensor | None, slots: Slots) -> None:
        """None: plans give no attention."""

    def logits(self, rows: Tensor) -> Tensor:
        """Returns `rows`: the last plan includes the head, so they are logits already."""
        return rows

    def decode(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """See `Backend.decode`.

        All slots from the first to the last of `slots` go through the plans. A slot between them that is not in `slots`
        gets a row of zeros after its rows; its next real row overwrites that.
        """
        assert isinstance(token_ids, np.ndarray), "the host knows all tokens"
        first = int(slots.min())
        span = np.arange(first, int(slots.max()) + 1)
        positions = np.ascontiguousarray(self.cache.next_positions(span).T - np.int32(1))
        placed_ids, asked, placed_positions = self._device.upload(token_ids, slots - first, np.maximum(positions, 0))
        rows = self._embedding.index_select(0, placed_ids)
        x = rows.new_zeros(len(span), rows.shape[1]).index_copy_(0, asked, rows)
        lengths = self._lengths_after_new_rows(span, slots)
        for index, stage in enumerate(self._stages):
            x = stage.decode(x, placed_positions[index], lengths[:, index], first)
        return Decoded(x.index_select(0, asked))

    def _lengths_after_new_rows(self, span: Slots, asked: Slots) -> IntArray:
        """`[num_slots, num_stages]` int32: lengths with the new row.

        `grow` has counted it for the slots of `asked` already. The other slots get one more, up to their full length.
        """
        lengths = self.cache.lengths(span)
        others = ~np.isin(span, asked)
        most = np.array([stage.spec.max_rows for stage in self._stages], dtype=np.int32)
        lengths[others] = np.minimum(lengths[others] + 1, most)
        return lengths

    def close(self) -> None:
        """There are no other processes."""
