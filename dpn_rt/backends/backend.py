"""What a runner asks of whatever computes rows: the product's own kernels (`kernels/`) or TensorRT plans
(`tensorrt/`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpn_rt.cache.block_allocator import Slots
from dpn_rt.device.device import Device
from dpn_rt.model.layout import Chunk, IntArray
from dpn_rt.model.reduction.reducer import DeviceInputs, Reduced, Reducer


class SequenceCache(Protocol):
    """Room for the keys and values of sequences, as the scheduler sees it."""

    @property
    def num_blocks(self) -> int:
        """KV blocks in all."""

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that a sequence could get."""

    @property
    def num_free_slots(self) -> int:
        """Sequences that could get a slot."""

    @property
    def bytes_in_use(self) -> int:
        """Memory that sequences use."""

    def check_fits(self, lengths: Sequence[int], max_tokens: int) -> None:
        """Raises CapacityError where a sequence with `lengths` rows per stage has no room in an empty cache."""

    def blocks_for(self, lengths: Sequence[int]) -> int:
        """KV blocks of a sequence with `lengths` rows per stage."""

    def blocks_of(self, slot: int) -> int:
        """KV blocks that a slot uses."""

    def blocks_to_grow(self, slots: Slots) -> int:
        """Free blocks needed to add one row to every stage of each of `slots`."""

    def grow(self, slots: Slots) -> None:
        """Makes room for that row."""

    def fill_stage(self, stage: int, slots: Slots, lengths: IntArray, next_positions: IntArray | None = None) -> None:
        """Makes room for `lengths` `[num_seqs]` rows of a stage in all.

        Args:
            stage: of the rows.
            slots: `[num_seqs]`.
            lengths: `[num_seqs]`.
            next_positions: `[num_seqs]` rotary position of the row after them; None: as many as the rows.
        """

    def fork(self, slot: int, max_blocks: int) -> int | None:
        """A new slot with the same rows, for at most `max_blocks` free blocks; None where that cannot be."""

    def open_slot(self) -> int:
        """A slot for a sequence."""

    def close_slot(self, slot: int) -> None:
        """Gives the slot and its blocks back."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a decode step gives; on the backend's device, until the next step."""

    logits: Tensor
    """`[num_seqs, vocab_size]`."""
    best: Tensor | None = None
    """`[num_seqs]` int64 as `sampling.filters.best_ids` makes it of the logits; None where the step did not."""


class PreparedStage(Protocol):
    """A stage that is ready for rows whose number the host has not been told yet."""

    @property
    def device_inputs(self) -> DeviceInputs:
        """What the boundary after it needs of its rows."""

    def run(self, rows: Tensor) -> Tensor:
        """`[num_rows, hidden_size]`, all rows of the stage, through it; as `Backend.run`."""

    def trim(self, kv_lengths: IntArray, next_positions: IntArray) -> None:
        """Gives back the room for rows beyond those of the stage.

        Args:
            kv_lengths: `[num_seqs]` rows that attention sees.
            next_positions: `[num_seqs]` rotary position of the row after them.
        """


class StagePreparer(Protocol):
    """Prepares a stage while the boundary before it is under way."""

    def prepare(
        self, stage: int, reduced: Reduced, most_rows: IntArray, slots: Slots, forced: IntArray
    ) -> PreparedStage | None:
        """What a stage needs, except for the number of its rows.

        Args:
            stage: after the boundary.
            reduced: the boundary's rows.
            most_rows: `[num_seqs]` rows that attention sees in the stage at most.
            slots: `[num_seqs]` slots in the KV cache.
            forced: `[num_seqs]` expert to take at the boundary after the stage.

        Returns:
            None where there is no room for so many rows that may never come.
        """


class Backend(Protocol):
    """Rows through the stages."""

    @property
    def cache(self) -> SequenceCache: ...

    @property
    def async_device(self) -> Device | None:
        """The device whose decode steps can be queued before the host knows their tokens; None: none."""

    @property
    def stage_sizes(self) -> Sequence[int]:
        """Layers of each stage."""

    @property
    def reducers(self) -> Sequence[Reducer]:
        """At the boundaries between the stages."""

    @property
    def preparer(self) -> StagePreparer | None:
        """None: a stage needs to know its rows."""

    def embed(self, row_ids: npt.NDArray[np.int64], image_rows: Sequence[Tensor]) -> Tensor:
        """The rows of a batch before the first stage.

        Args:
            row_ids: `[num_rows]` token id of each row, negative where the next row of the images goes.
            image_rows: `[num_visual_tokens, hidden_size]` of each image, on any device.

        Returns:
            `[num_rows, hidden_size]` on the backend's device.
        """

    def run(self, stage: int, x: Tensor, chunk: Chunk, slots: Slots) -> Tensor:
        """Rows through a stage; their keys and values go to the cache, where room has been made.

        Args:
            stage: of the rows.
            x: `[num_rows, hidden_size]`; may be overwritten.
            chunk: the rows' places.
            slots: `[num_seqs]` slots of the chunk's sequences.

        Returns:
            `[num_rows, hidden_size]`; from the last stage what `logits` takes, for each sequence that ends here.
        """

    def logits(self, rows: Tensor) -> Tensor:
        """`[num_seqs, vocab_size]` of what the last stage gave."""

    def decode(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """One new row for each sequence, whose room in the cache has been made.

        Args:
            token_ids: `[num_seqs]`, the last token of each sequence; a tensor on `async_device` where the host does not
                know them yet, with negative ones where nothing reads what follows.
            slots: `[num_seqs]` slots in the KV cache.
        """
