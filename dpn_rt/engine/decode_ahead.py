"""Decode steps on a device, each queued before the host has read the tokens of the step before.

Between two steps the host reads tokens, ends sequences and makes text. A device that waited for that would be idle. So
the next step takes the tokens of the last one directly from the device's memory. When the host then finds that a
sequence has ended, the queued step computes one row too many for it, and that row is dropped. The sequence's KV blocks
can be given to other sequences at once, since a device does its work in the order in which it was queued.
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
    """Queues decode steps ahead of the host. At most two steps are queued at a time."""

    def __init__(self, runner: Runner, scheduler: Scheduler, sampler: Sampler, device: Device) -> None:
        self._runner, self._scheduler, self._sampler, self._device = runner, scheduler, sampler, device
        self._queued: _QueuedStep | None = None
        self._failed: tuple[Batch, Exception] | None = None

    def takes(self, batch: Batch) -> bool:
        """Whether the tokens of all sequences of a batch can be chosen without the host."""
        return all(sequence.sampling.can_run_ahead for sequence in batch.sequences)

    def pending(self) -> Batch | None:
        """The batch of the queued step whose tokens `step` has not returned yet.

        None if there is no such step, or if all of its sequences have finished: then the step is dropped.
        """
        batch = self._failed[0] if self._failed else self._queued.batch if self._queued else None
        if batch is None or all(sequence.is_finished for sequence in batch.sequences):
            self._queued = self._failed = None
            return None
        return batch

    def step(self, batch: Batch) -> SampledTokens:
        """Queues the step after `batch`, then waits for the tokens of `batch`.

        Args:
            batch: the `pending` one; where nothing is pending, a batch whose step is queued now.

        Returns:
            One token per sequence of the batch; those of sequences that have finished since are not to be used.

        Raises:
            Exception: the error of this batch's step, also where it was raised while the step was queued ahead.
        """
        failed, queued = self._failed, self._queued
        self._failed = self._queued = None
        if failed is not None:
            raise failed[1]
        queued = queued or self._queue(batch, None)
        self._queue_next(queued)
        return sampled_tokens(queued.reading.wait())

    def _queue_next(self, last: _QueuedStep) -> None:
        batch = self._scheduler.schedule_ahead()
        if batch is None:
            return
        try:
            self._queued = self._queue(batch, last)  # its sequences are all in the last step
        except Exception as error:  # raised later: the tokens of the last step are returned first
            self._failed = (batch, error)

    def _queue(self, batch: Batch, last: _QueuedStep | None) -> _QueuedStep:
        decoded = self._runner.decode(batch, None if last is None else self._token_ids(batch, last))
        states = [sequence.sampling for sequence in batch.sequences]
        ids = self._sampler.choose(decoded.logits, states, decoded.best, num_unread=0 if last is None else 1)
        return _QueuedStep(batch, ids, self._device.read(ids))

    def _token_ids(self, batch: Batch, last: _QueuedStep) -> Tensor:
        """`[num_seqs]` int64 on the device: the last step's token of each sequence of `batch`."""
        ids = last.ids[0]
        if batch.sequences == last.batch.sequences:
            return ids
        rows = {sequence: row for row, sequence in enumerate(last.batch.sequences)}
        kept = np.array([rows[sequence] for sequence in batch.sequences], dtype=np.int64)
        return ids.index_select(0, self._device.upload(kept)[0])
