"""The interface of a backend, which computes rows: the product's own kernels (`kernels/`) or TensorRT plans
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
from dpn_rt.model.reduction.reducer import AttentionScores, DeviceInputs, Reduced, Reducer


class SequenceCache(Protocol):
    """The KV cache as the scheduler sees it: blocks, and slots of sequences."""

    @property
    def num_blocks(self) -> int:
        """Number of KV blocks, used and free."""

    @property
    def num_free_blocks(self) -> int:
        """Number of KV blocks that a sequence could get now."""

    @property
    def num_free_slots(self) -> int:
        """Number of sequences that could get a slot now."""

    @property
    def bytes_in_use(self) -> int:
        """Bytes that sequences use."""

    def check_fits(self, lengths: Sequence[int], max_tokens: int) -> None:
        """Refuse a sequence with `lengths` rows per stage that has no room in an empty cache.

        Raises:
            CapacityError: names the limits; `max_tokens` is for the message.
        """

    def blocks_for(self, lengths: Sequence[int]) -> int:
        """Number of KV blocks that a sequence with `lengths` rows per stage takes."""

    def blocks_of(self, slot: int) -> int:
        """Number of KV blocks that a slot uses."""

    def blocks_to_grow(self, slots: Slots) -> int:
        """Number of free blocks needed to add one row to every stage of each of `slots`."""

    def grow(self, slots: Slots) -> None:
        """Makes room for one more row in every stage of each of `slots`."""

    def fill_stage(self, stage: int, slots: Slots, lengths: IntArray, next_positions: IntArray | None = None) -> None:
        """Makes room in one stage, so that each slot has room for `lengths` rows, earlier ones included.

        Args:
            stage: of the rows.
            slots: `[num_seqs]`.
            lengths: `[num_seqs]` int32 rows of each slot.
            next_positions: `[num_seqs]` int32 rotary position of the first row after them; None: `lengths`.
        """

    def fork(self, slot: int, max_blocks: int) -> int | None:
        """A new slot with the rows of `slot`; None where that would take more than `max_blocks` free blocks."""

    def open_slot(self) -> int:
        """A new, empty slot for a sequence."""

    def close_slot(self, slot: int) -> None:
        """Gives the slot and its blocks back."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """Results of a decode step, on the backend's device. They are valid until the next step."""

    logits: Tensor
    """`[num_seqs, vocab_size]`."""
    best: Tensor | None = None
    """`[num_seqs]` int64, `sampling.filters.best_ids` of the logits; None where the step did not compute it."""


@dataclass(frozen=True, eq=False)
class StageRun:
    """What rows became of a stage."""

    rows: Tensor
    """`[num_rows, hidden_size]`; from the last stage `[num_ends, hidden_size]`, of the sequences that end."""
    queries: Tensor | None = None
    """`[num_ends, num_heads, head_dim]` rotated queries, in the stage's last layer, of the last row of each sequence
    that ends; None where no boundary reads them."""


class PreparedStage(Protocol):
    """A stage that is ready to run before the host knows how many rows it has."""

    @property
    def device_inputs(self) -> DeviceInputs:
        """The layout of the stage's rows, which the boundary after the stage needs."""

    def run(self, rows: Tensor) -> StageRun:
        """Runs all rows of the stage, `[num_rows, hidden_size]`; returns what `Backend.run` returns."""

    def trim(self, kv_lengths: IntArray, next_positions: IntArray) -> None:
        """Gives back the KV blocks that the stage's rows do not need.

        Args:
            kv_lengths: `[num_seqs]` int32 rows that attention sees, cached ones included.
            next_positions: `[num_seqs]` int32 rotary position of the first row after them.
        """


class StagePreparer(Protocol):
    """Prepares a stage while the boundary before it is still being computed."""

    def prepare(
        self, stage: int, reduced: Reduced, most_rows: IntArray, slots: Slots, forced: IntArray
    ) -> PreparedStage | None:
        """Prepares all that a stage needs except for the number of its rows.

        Args:
            stage: the one after the boundary.
            reduced: result of the boundary, still on the device.
            most_rows: `[num_seqs]` int32 upper bound of the rows that attention sees in the stage.
            slots: `[num_seqs]` slots in the KV cache.
            forced: `[num_seqs]` int32 expert to take at the boundary after the stage, -1 where its router decides.

        Returns:
            The stage; None where there are not enough unused KV blocks for `most_rows`.
        """


class Backend(Protocol):
    """Runs rows through the stages."""

    @property
    def cache(self) -> SequenceCache: ...

    @property
    def async_device(self) -> Device | None:
        """The device, if decode steps can be queued on it before the host knows their tokens; otherwise None."""

    @property
    def stage_sizes(self) -> Sequence[int]:
        """Number of layers of each stage."""

    @property
    def reducers(self) -> Sequence[Reducer]:
        """The reducers of the boundaries, in order."""

    @property
    def preparer(self) -> StagePreparer | None:
        """None: a stage cannot be prepared before the host knows its rows."""

    def embed(self, row_ids: npt.NDArray[np.int64], image_rows: Sequence[Tensor]) -> Tensor:
        """The rows of a batch that enter the first stage.

        Args:
            row_ids: `[num_rows]` token id of each row; negative ids are replaced by the rows of the images, in order.
            image_rows: `[num_visual_tokens, hidden_size]` of each image, on any device.

        Returns:
            `[num_rows, hidden_size]` on the backend's device.
        """

    def run(self, stage: int, x: Tensor, keys: Tensor | None, chunk: Chunk, slots: Slots) -> StageRun:
        """Runs rows through one stage. Their keys and values are stored in the cache, which has room for them.

        Args:
            stage: to run.
            x: `[num_rows, hidden_size]`; may be overwritten.
            keys: of the rows in the stage's first layer, as `Reduced.next_keys`; None: they are computed.
            chunk: offsets, positions and cache rows of the rows.
            slots: `[num_seqs]` slots of the chunk's sequences.

        Returns:
            See `StageRun`; from the last stage, one row for `logits` per sequence that ends in this chunk.
        """

    def scores(self, stage: int, queries: Tensor | None, slots: Slots) -> AttentionScores | None:
        """What reducers may ask for at the end of a stage; None where the backend has no such thing.

        Args:
            stage: that has ended.
            queries: `[num_seqs, num_heads, head_dim]` of all sequences, as `run` gave them.
            slots: `[num_seqs]` slots in the KV cache.
        """

    def logits(self, rows: Tensor) -> Tensor:
        """`[num_seqs, vocab_size]` of the rows that `run` of the last stage returned."""

    def decode(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """Computes one new row for each sequence; the cache has room for it.

        Args:
            token_ids: `[num_seqs]` the last token of each sequence. Where the host does not know them yet, a tensor on
                `async_device`; an id in it may be negative if the row's result is not used.
            slots: `[num_seqs]` slots in the KV cache.
        """

    def close(self) -> None:
        """Ends processes that were started, if there are any. Nothing can be run after that."""
