"""Plans instead of the product's own kernels: stages on padded rows, the product's boundaries between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Decoded, NewSequences
from dpn_rt.cache.kv_cache import Slots
from dpn_rt.model.layout import IntArray, Layout
from dpn_rt.model.pyramid import Boundary, BoundaryTrace
from dpn_rt.plans.padding import neighbours
from dpn_rt.plans.slots import SlotCache
from dpn_rt.plans.stage import PlanStage


class PlanBackend:
    """A `Backend`: the stages' plans, the boundaries between them, and the slots that they fill."""

    def __init__(
        self,
        embedding: Tensor,
        stages: Sequence[PlanStage],
        boundaries: Sequence[Boundary],
        cache: SlotCache,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            embedding: `[vocab_size, hidden_size]` on the CPU.
            stages: one more than `boundaries`, which run on the CPU.
            cache: of the stages.
            device: of the plans' tensors.
            dtype: of the plans' tensors. On the CPU rows have the embedding's.
        """
        self._embedding, self._device, self._dtype = embedding, device, dtype
        self._stages, self._boundaries = stages, boundaries
        self.cache = cache

    def embed(self, row_ids: npt.NDArray[np.int64], image_rows: Sequence[Tensor]) -> Tensor:
        """`[num_rows, hidden_size]` before the first stage, on the CPU."""
        x = self._embedding.index_select(0, torch.from_numpy(np.maximum(row_ids, 0)))
        if not image_rows:
            return x
        visual = torch.from_numpy(np.flatnonzero(row_ids < 0))
        return x.index_copy_(0, visual, torch.cat(list(image_rows)).to(x.dtype))

    def prefill(self, sequences: NewSequences) -> PlanPrefill:
        """New sequences before the first stage."""
        return PlanPrefill(self._stages, self._boundaries, self.cache, sequences, self._device, self._dtype)

    def decode(self, token_ids: npt.NDArray[np.int64], slots: Slots) -> Decoded:
        """Logits on the CPU behind one new row for each sequence, whose room has been made.

        All slots from the first to the last of `slots` go through the plans. Those between that nobody asked for get a
        row of zeros behind what they hold, which the next row that they get replaces.
        """
        first = int(slots.min())
        span = np.arange(first, int(slots.max()) + 1)
        asked = torch.from_numpy(slots - first).to(self._device)
        embedded = self.embed(token_ids, ())
        rows = embedded.to(self._device, self._dtype)
        x = rows.new_zeros(len(span), rows.shape[1]).index_copy_(0, asked, rows)
        lengths = self._lengths_behind_new_rows(span, slots)
        for index, stage in enumerate(self._stages):
            x = stage.decode(x, lengths[:, index], first)
        return Decoded(x.index_select(0, asked).to(embedded.device, embedded.dtype))

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
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._stages, self._boundaries, self._cache = stages, boundaries, cache
        self._device, self._dtype = device, dtype
        self._sequences = sequences
        self.layouts: list[Layout] = [sequences.layout]
        """Of each stage."""
        self.traces: list[BoundaryTrace] = []
        """Of each boundary."""
        self.exit_rows: list[Tensor | None] = [None] * sequences.layout.num_seqs
        """Nothing is kept: slots cannot be shared."""
        self.logits: Tensor | None = None
        """`[num_seqs, vocab_size]` on the CPU, when done."""

    @property
    def is_done(self) -> bool:
        return self.logits is not None

    @property
    def layers(self) -> int:
        """Of the model: nothing is computed in parts."""
        return sum(len(stage.spec.layers) for stage in self._stages)

    def advance(self, max_rows: int | None = None) -> None:
        """Everything, whatever `max_rows`: plans take sequences as a whole."""
        x = self._sequences.x
        for index, stage in enumerate(self._stages):
            layout = self.layouts[-1]
            self._cache.fill_stage(index, self._sequences.slots, layout.kv_lengths)
            x = self._through(stage, x, layout)
            if index < len(self._boundaries):
                forced = self._sequences.forced_experts[:, index]
                x, layout, trace = self._boundaries[index].apply(x, layout, forced, self._sequences.router_biases)
                self.layouts.append(layout)
                self.traces.append(trace)
        self.logits = x

    def drop(self, index: int) -> None:
        """Nothing to go on without: a prefill begins and ends within one step."""
        raise AssertionError("a prefill on plans is never left in parts")

    def _through(self, stage: PlanStage, x: Tensor, layout: Layout) -> Tensor:
        """Packed rows or logits on the CPU, in the order of the batch; groups of sequences that share a plan's run."""
        parts = torch.split(x, layout.lengths.tolist())
        results: list[Tensor] = [x] * layout.num_seqs
        for group in neighbours(self._sequences.slots, stage.spec.max_batch):
            lengths = layout.lengths[group]
            rows = torch.cat([parts[index] for index in group]).to(self._device, self._dtype)
            out = stage.prefill(rows, lengths, int(self._sequences.slots[group[0]])).to(x.device, x.dtype)
            sizes = [1] * len(group) if stage.spec.is_last else lengths.tolist()
            for index, part in zip(group, torch.split(out, sizes), strict=True):
                results[index] = part
        return torch.cat(results)
