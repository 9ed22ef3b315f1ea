"""Decode steps on a device: the next one is queued before the host has read the tokens of the last.

A device that waits for the host between two steps loses what the host takes to read tokens, to end sequences and to
make text. So the tokens of a step go into the next one where they are. A sequence that turns out to have ended has gone
one step too far then: that row is thrown away. Its KV blocks may be given to others at once, since a device does things
in the order in which they were queued.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dpn_rt.device.device import Device, Readback
from dpn_rt.engine.runner import Runner
from dpn_rt.engine.scheduler import Batch, Scheduler
from dpn_rt.sampling.sampler import SampledTokens, Sampler, sampled_tokens


@dataclass(frozen=True, eq=False)
class _QueuedStep:
    batch: Batch
    ids: Tensor
    """`[2, num_seqs]` int64 as `Sampler.choose` gives them, on the device."""
    reading: Readback


class DecodeAhead:
    """At most two steps are queued at a time."""

    def __init__(self, runner: Runner, scheduler: Scheduler, sampler: Sampler, device: Device) -> None:
        self._runner, self._scheduler, self._sampler, self._device = runner, scheduler, sampler, device
        self._queued: _QueuedStep | None = None
        self._failed: tuple[Batch, Exception] | None = None

    def takes(self, batch: Batch) -> bool:
        """Whether tokens of a batch can be chosen without the host."""
        return all(sequence.sampling.can_run_ahead for sequence in batch.sequences)

    def pending(self) -> Batch | None:
        """The batch of a step whose tokens have not been given yet, if anybody still waits for them."""
        batch = self._failed[0] if self._failed else self._queued.batch if self._queued else None
        if batch is None or all(sequence.is_finished for sequence in batch.sequences):
            self._queued = self._failed = None
            return None
        return batch

    def step(self, batch: Batch) -> SampledTokens:
        """The tokens of a batch, `pending` or to be queued now, for its sequences that have not ended since.

        Raises:
            Exception: what went wrong in this batch's step, even if that was noticed when it was queued.
        """
        failed, queued = self._failed, self._queued
        self._failed = self._queued = None
        if failed is not None:
            raise failed[1]
        queued = queued or self._queue(batch, None)
        self._queue_next(queued)
        return sampled_tokens(queued.reading.wait()[0])

    def _queue_next(self, last: _QueuedStep) -> None:
        batch = self._scheduler.schedule_ahead()
        if batch is None:
            return
        try:
            self._queued = self._queue(batch, last)  # of sequences that the last step has taken
        except Exception as error:  # the tokens of the last step come first
            self._failed = (batch, error)

    def _queue(self, batch: Batch, last: _QueuedStep | None) -> _QueuedStep:
        decoded = self._runner.decode(batch, None if last is None else self._token_ids(batch, last))
        states = [sequence.sampling for sequence in batch.sequences]
        ids = self._sampler.choose(decoded.logits, states, decoded.best, num_unread=0 if last is None else 1)
        return _QueuedStep(batch, ids, self._device.read(ids))

    def _token_ids(self, batch: Batch, last: _QueuedStep) -> Tensor:
        """`[num_seqs]` on the device, the last step's token of each sequence."""
        ids = last.ids[0]
        if batch.sequences == last.batch.sequences:
            return ids
        rows = {sequence: row for row, sequence in enumerate(last.batch.sequences)}
        kept = np.array([rows[sequence] for sequence in batch.sequences], dtype=np.int64)
        return ids.index_select(0, self._device.upload(kept)[0])
