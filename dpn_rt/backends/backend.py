"""What a runner asks of whatever computes rows: the product's own kernels on the CPU (`native.py`) or on a device
(`on_device/`), or TensorRT plans (`dpn_rt/plans/`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpn_rt.cache.block_allocator import Slots
from dpn_rt.device.device import Device
from dpn_rt.model.layout import IntArray, Layout
from dpn_rt.model.reduction.pooling import BoundaryTrace


@dataclass(frozen=True, eq=False)
class Beginning:
    """What of a prompt is in the cache already."""

    num_rows: int = 0
    """Rows of text at the beginning, in every stage."""
    num_exit_rows: int = 0
    """Rows behind them, the image's last the last of them, that are in the cache in stage 0 alone."""
    exit_rows: Tensor | None = None
    """`[num_exit_rows, hidden_size]`: these rows as they left stage 0; None where no boundary follows."""


@dataclass(frozen=True, eq=False)
class NewSequences:
    """One batch of sequences before their prefill."""

    x: Tensor
    """`[num_rows, hidden_size]` embeddings of the rows that are not in the cache; may be overwritten."""
    layout: Layout
    """Of the rows behind each beginning's `num_rows`."""
    slots: Slots
    """`[num_seqs]` slots in the KV cache, which hold the beginnings; filled."""
    forced_experts: IntArray
    """`[num_seqs, num_boundaries]`, -1 where the router decides."""
    router_biases: npt.NDArray[np.float64]
    """`[num_seqs]` added to the routers' logits per level of compression."""
    beginnings: Sequence[Beginning]
    """Of each sequence."""
    kept_rows: Sequence[tuple[int, int]]
    """First and last (excluded) of the rows of each sequence in `layout` to keep as they leave stage 0; (0, 0) for
    none."""


class StagedPrefill(Protocol):
    """New sequences on their way. `advance` until `is_done`; then the results are there."""

    layouts: list[Layout]
    traces: list[BoundaryTrace]
    exit_rows: list[Tensor | None]
    logits: Tensor | None

    @property
    def is_done(self) -> bool: ...

    @property
    def layers(self) -> int:
        """Of the stage that the next chunk goes through."""

    def advance(self, max_rows: int | None = None) -> None:
        """The next rows through their stage; None: all of it."""

    def drop(self, index: int) -> None:
        """Goes on without one sequence."""


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


class Backend(Protocol):
    """Rows through the stages."""

    @property
    def cache(self) -> SequenceCache: ...

    @property
    def queue(self) -> Device | None:
        """The device whose decode steps can be queued before their tokens are known to the host; None: none."""

    def embed(self, row_ids: npt.NDArray[np.int64], image_rows: Sequence[Tensor]) -> Tensor:
        """The rows of a batch before the first stage.

        Args:
            row_ids: `[num_rows]` token id of each row, negative where the next row of the images goes.
            image_rows: `[num_visual_tokens, hidden_size]` of each image, on any device.

        Returns:
            `[num_rows, hidden_size]` on the backend's device.
        """

    def prefill(self, sequences: NewSequences) -> StagedPrefill:
        """New sequences before the first stage."""

    def decode(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """One new row for each sequence, whose room in the cache has been made.

        Args:
            token_ids: `[num_seqs]`, the last token of each sequence; a tensor on `queue` where only that has them, with
                negative ones where nobody will look at what follows.
            slots: `[num_seqs]` slots in the KV cache.
        """
