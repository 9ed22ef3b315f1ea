"""One stage on its two plans: rows and lengths in, rows or logits out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpn_rt.model.layout import IntArray
from dpn_rt.plans import tensors
from dpn_rt.plans.padding import pad, unpad
from dpn_rt.plans.plan import Plan
from dpn_rt.plans.slots import SlotMemory
from dpn_rt.plans.tensors import StagePlan, cache_names


@dataclass(frozen=True, eq=False)
class LoadedPlan:
    """A plan, and what it is of."""

    spec: StagePlan
    plan: Plan


class PlanStage:
    """A run of decoder layers."""

    def __init__(
        self, prefill: LoadedPlan, decode: LoadedPlan, weights: Mapping[str, Tensor], memory: SlotMemory
    ) -> None:
        """`weights`: those of `StagePlan.weights`, and the rotary table; on the plans' device. Both plans read them."""
        self._prefill, self._decode = prefill, decode
        self._weights = weights
        self._memory = memory
        self._caches = tuple(name for layer in prefill.spec.layers for name in cache_names(layer))

    @property
    def spec(self) -> StagePlan:
        """Of the prefill."""
        return self._prefill.spec

    def prefill(self, rows: Tensor, lengths: IntArray, first_slot: int) -> Tensor:
        """New sequences, one slot after the other.

        Args:
            rows: `[num_rows, hidden_size]` packed, on the device.
            lengths: `[num_seqs]` rows of each sequence.
            first_slot: of the first sequence.

        Returns:
            `[num_rows, hidden_size]` packed; from the last stage logits `[num_seqs, vocab_size]`.
        """
        padded = pad(rows, lengths)
        positions = np.broadcast_to(np.arange(padded.shape[1], dtype=np.int32), padded.shape[:2])
        out = self._run(self._prefill, padded, positions, np.zeros_like(lengths), lengths, first_slot)
        return out if self.spec.is_last else unpad(out, lengths)

    def decode(self, rows: Tensor, lengths: IntArray, first_slot: int) -> Tensor:
        """One new row for each of some slots that follow one another.

        Args:
            rows: `[num_slots, hidden_size]`, on the device.
            lengths: `[num_slots]` rows of each slot that the new one sees, itself the last of them.
            first_slot: of the first row.

        Returns:
            `[num_slots, hidden_size]`; from the last stage logits `[num_slots, vocab_size]`.
        """
        before = lengths - np.int32(1)
        out = self._run(self._decode, rows.unsqueeze(1), before[:, None], before, lengths, first_slot)
        return out if self.spec.is_last else out.squeeze(1)

    def _run(
        self,
        loaded: LoadedPlan,
        hidden: Tensor,
        positions: IntArray,
        write_rows: IntArray,
        kv_lengths: IntArray,
        first_slot: int,
    ) -> Tensor:
        def on_device(values: IntArray) -> Tensor:
            return torch.from_numpy(np.array(values, dtype=np.int32, order="C")).to(hidden.device)

        batch = len(kv_lengths)
        caches = self._memory.part(self._caches, first_slot, batch)
        inputs = {
            tensors.HIDDEN: hidden,
            tensors.POSITIONS: on_device(positions),
            tensors.WRITE_ROWS: on_device(write_rows),
            tensors.KV_LENGTHS: on_device(kv_lengths),
            **caches,
            **self._weights,
        }
        if tensors.LAST_ROWS in loaded.spec.inputs():
            inputs[tensors.LAST_ROWS] = on_device(kv_lengths[:, None] - 1)
        name, shape = tensors.HIDDEN_OUT, tuple(hidden.shape)
        if loaded.spec.is_last:
            name, shape = tensors.LOGITS, (batch, loaded.spec.model.decoder.vocab_size)
        out = hidden.new_empty(shape)
        loaded.plan.run(inputs, {name: out, **{f"{cache}_out": tensor for cache, tensor in caches.items()}})
        return out
