"""One stage and its two plans, which take padded rows and lengths and return rows or logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpn_rt.backends.tensorrt import tensors
from dpn_rt.backends.tensorrt.plan import Plan
from dpn_rt.backends.tensorrt.slots import SlotMemory
from dpn_rt.backends.tensorrt.tensors import StagePlan, cache_names
from dpn_rt.device.device import Device
from dpn_rt.model.layout import IntArray


@dataclass(frozen=True, eq=False)
class LoadedPlan:
    """A loaded plan, with the stage and phase that it computes."""

    spec: StagePlan
    plan: Plan


class PlanStage:
    """A stage of decoder layers, computed by a prefill plan and a decode plan."""

    def __init__(
        self,
        prefill: LoadedPlan,
        decode: LoadedPlan,
        weights: Mapping[str, Tensor],
        memory: SlotMemory,
        device: Device,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            prefill: the stage's plan for prompts.
            decode: the stage's plan for one new row per sequence.
            weights: those of `StagePlan.weights`, and the rotary table. Both plans read them.
            memory: KV caches of the slots.
            device: of all tensors.
            dtype: of the plans' rows. Rows of another dtype are converted before a plan and back after it.
        """
        self._prefill, self._decode = prefill, decode
        self._weights = weights
        self._memory = memory
        self._device, self._dtype = device, dtype
        self._caches = tuple(name for layer in prefill.spec.layers for name in cache_names(layer))

    @property
    def spec(self) -> StagePlan:
        """The prefill plan's."""
        return self._prefill.spec

    def prefill(self, rows: Tensor, positions: Tensor, lengths: IntArray, first_slot: int) -> Tensor:
        """Compute the prompts of new sequences, which have consecutive slots.

        Args:
            rows: `[num_seqs, longest, hidden_size]`; the padding after a sequence may have any values.
            positions: `[num_seqs, longest]` int32 rotary position of each row, on the device.
            lengths: `[num_seqs]` int32 rows of each sequence.
            first_slot: slot of the first sequence.

        Returns:
            `[num_seqs, longest, hidden_size]`; from the last stage logits `[num_seqs, vocab_size]`.
        """
        return self._run(self._prefill, rows, positions, np.zeros_like(lengths), lengths, first_slot)

    def decode(self, rows: Tensor, positions: Tensor, lengths: IntArray, first_slot: int) -> Tensor:
        """Compute one new row for each of some consecutive slots.

        Args:
            rows: `[num_slots, hidden_size]`.
            positions: `[num_slots]` int32 rotary position of each row, on the device.
            lengths: `[num_slots]` int32 rows that each new row sees, itself included.
            first_slot: slot of the first row.

        Returns:
            `[num_slots, hidden_size]`; from the last stage logits `[num_slots, vocab_size]`.
        """
        before = lengths - np.int32(1)
        out = self._run(self._decode, rows.unsqueeze(1), positions[:, None], before, lengths, first_slot)
        return out if self.spec.is_last else out.squeeze(1)

    def _run(
        self,
        loaded: LoadedPlan,
        hidden: Tensor,
        positions: Tensor,
        write_rows: IntArray,
        kv_lengths: IntArray,
        first_slot: int,
    ) -> Tensor:
        batch = len(kv_lengths)
        caches = self._memory.part(self._caches, first_slot, batch)
        names = [tensors.WRITE_ROWS, tensors.KV_LENGTHS]
        arrays = [write_rows, kv_lengths]
        if tensors.LAST_ROWS in loaded.spec.inputs():
            names.append(tensors.LAST_ROWS)
            arrays.append(kv_lengths[:, None] - np.int32(1))
        placed = dict(zip(names, self._device.upload(*arrays), strict=True))
        placed[tensors.POSITIONS] = positions
        inputs = {tensors.HIDDEN: hidden.to(self._dtype), **placed, **caches, **self._weights}
        name, shape = tensors.HIDDEN_OUT, tuple(hidden.shape)
        if loaded.spec.is_last:
            name, shape = tensors.LOGITS, (batch, loaded.spec.model.decoder.vocab_size)
        out = hidden.new_empty(shape, dtype=self._dtype)
        loaded.plan.run(inputs, {name: out, **{f"{cache}_out": tensor for cache, tensor in caches.items()}})
        return out.to(hidden.dtype)
