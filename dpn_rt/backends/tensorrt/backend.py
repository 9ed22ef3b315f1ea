"""Plans instead of the product's own kernels: stages on padded rows, the product's boundaries between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Decoded, NewSequences
from dpn_rt.backends.tensorrt.padding import Indices, neighbours, pad
from dpn_rt.backends.tensorrt.slots import SlotCache
from dpn_rt.backends.tensorrt.stage import PlanStage
from dpn_rt.cache.block_allocator import Slots
from dpn_rt.device.device import Device
from dpn_rt.model.layout import IntArray, Layout
from dpn_rt.model.reduction.pooling import Boundary, BoundaryTrace, join_traces
from dpn_rt.model.rows import embed_rows


class PlanBackend:
    """A `Backend`: the stages' plans, the boundaries between them, and the slots that they fill."""

    def __init__(
        self,
        embedding: Tensor,
        stages: Sequence[PlanStage],
        boundaries: Sequence[Boundary],
        cache: SlotCache,
        device: Device,
    ) -> None:
        """
        Args:
            embedding: `[vocab_size, hidden_size]`; between plans rows are of its dtype.
            stages: one more than `boundaries`.
            boundaries: on `device`.
            cache: of the stages.
            device: of all tensors.
        """
        self._embedding, self._device = embedding, device
        self._stages, self._boundaries = stages, boundaries
        self.cache = cache
        self.queue: Device | None = None

    def embed(self, row_ids: npt.NDArray[np.int64], image_rows: Sequence[Tensor]) -> Tensor:
        """`[num_rows, hidden_size]` before the first stage."""
        token_ids, visual = self._device.upload(np.maximum(row_ids, 0), np.flatnonzero(row_ids < 0))
        return embed_rows(self._embedding, token_ids, visual, image_rows)

    def prefill(self, sequences: NewSequences) -> PlanPrefill:
        """New sequences before the first stage."""
        return PlanPrefill(self._stages, self._boundaries, self.cache, sequences, self._device)

    def decode(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """Logits behind one new row for each sequence, whose room has been made.

        All slots from the first to the last of `slots` go through the plans. Those between that nobody asked for get a
        row of zeros behind what they hold, which the next row that they get replaces.
        """
        assert isinstance(token_ids, np.ndarray), "nothing is queued ahead"
        first = int(slots.min())
        span = np.arange(first, int(slots.max()) + 1)
        placed_ids, asked = self._device.upload(token_ids, slots - first)
        rows = self._embedding.index_select(0, placed_ids)
        x = rows.new_zeros(len(span), rows.shape[1]).index_copy_(0, asked, rows)
        lengths = self._lengths_behind_new_rows(span, slots)
        for index, stage in enumerate(self._stages):
            x = stage.decode(x, lengths[:, index], first)
        return Decoded(x.index_select(0, asked))

    def _lengths_behind_new_rows(self, span: Slots, asked: Slots) -> IntArray:
        """`[num_slots, num_stages]`: as they are where room was made, one more where nobody asked, within the slot."""
        lengths = self.cache.lengths(span)
        others = ~np.isin(span, asked)
        most = np.array([stage.spec.max_rows for stage in self._stages], dtype=np.int32)
        lengths[others] = np.minimum(lengths[others] + 1, most)
        return lengths


class PlanPrefill:
    """One batch of new sequences: `advance` takes all of them through all stages at once."""

    def __init__(
        self,
        stages: Sequence[PlanStage],
        boundaries: Sequence[Boundary],
        cache: SlotCache,
        sequences: NewSequences,
        device: Device,
    ) -> None:
        self._stages, self._boundaries, self._cache = stages, boundaries, cache
        self._device = device
        self._sequences = sequences
        self.layouts: list[Layout] = [sequences.layout]
        """Of each stage."""
        self.traces: list[BoundaryTrace] = []
        """Of each boundary."""
        self.exit_rows: list[Tensor | None] = [None] * sequences.layout.num_seqs
        """Nothing is kept: slots cannot be shared."""
        self.logits: Tensor | None = None
        """`[num_seqs, vocab_size]`, when done."""

    @property
    def is_done(self) -> bool:
        return self.logits is not None

    @property
    def layers(self) -> int:
        """Of the model: nothing is computed in parts."""
        return sum(len(stage.spec.layers) for stage in self._stages)

    def advance(self, max_rows: int | None = None) -> None:
        """Everything, whatever `max_rows`: plans take sequences as a whole, those in neighbouring slots together."""
        groups = neighbours(self._sequences.slots, self._stages[0].spec.max_batch)
        results = [self._run(group) for group in groups]
        order = np.argsort(np.concatenate(groups))
        for index in range(len(self._boundaries)):
            grids = np.concatenate([layouts[index + 1].grids for _, layouts, _ in results])[order]
            self.layouts.append(self.layouts[-1].pooled(grids))
            self.traces.append(join_traces([traces[index] for _, _, traces in results], order))
        logits = torch.cat([part for part, _, _ in results])
        self.logits = logits.index_select(0, self._device.upload(order)[0])

    def drop(self, index: int) -> None:
        """Nothing to go on without: a prefill begins and ends within one step."""
        raise AssertionError("a prefill on plans is never left in parts")

    def _run(self, group: Indices) -> tuple[Tensor, list[Layout], list[BoundaryTrace]]:
        """Logits of some sequences, their layout in each stage, and what each boundary did. Rows stay padded."""
        sequences = self._sequences
        slots, biases = sequences.slots[group], sequences.router_biases[group]
        x = pad(sequences.x, sequences.layout, group, self._device)
        layouts, traces = [sequences.layout.select(group)], []
        for index, stage in enumerate(self._stages):
            layout = layouts[-1]
            self._cache.fill_stage(index, slots, layout.kv_lengths)
            x = stage.prefill(x, layout.lengths, int(slots[0]))
            if index < len(self._boundaries):
                forced = sequences.forced_experts[group, index]
                x, layout, trace = self._boundaries[index].apply_padded(x, layout, forced, biases)
                layouts.append(layout)
                traces.append(trace)
        return x, layouts, traces
