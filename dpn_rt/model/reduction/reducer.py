"""What a prefill asks of a reducer: fewer visual rows between two stages, whatever the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpn_rt.errors import RequestError
from dpn_rt.model.layout import IntArray, Layout
from dpn_rt.model.reduction.choice import Choice
from dpn_rt.ops import DeviceLayout


@dataclass(frozen=True, eq=False)
class NextScores:
    """Attention as it would be in the layer after a boundary, and what that layer need not compute again."""

    scores: Tensor
    """`[visual rows of all chosen images]` float32, mean over the heads."""
    keys: Tensor | None
    """`[num_rows, num_kv_heads * head_dim]` of the layer, for all rows, not rotated; None: it computes them again."""


class AttentionScores(Protocol):
    """Attention of each sequence's last prompt row to the visual rows of images, softmax over all rows it sees."""

    def here(self, layout: Layout, images: IntArray) -> Tensor:
        """In the layer that the boundary follows.

        Args:
            layout: of the stage that ends.
            images: `[num_chosen]` ascending images of the layout.

        Returns:
            `[visual rows of all chosen images]` float32, mean over the heads.
        """

    def next(self, rows: Tensor, layout: Layout, images: IntArray) -> NextScores:
        """As it would be in the layer after the boundary, if `rows` went on as they are."""


@dataclass(frozen=True)
class DeviceInputs:
    """A layout and what was chosen beforehand, where the rows are."""

    layout: DeviceLayout
    forced: Tensor
    """`[num_seqs]` int32 expert to take, -1 where the router decides."""


@dataclass(frozen=True, eq=False)
class StageOutput:
    """The rows that leave a stage, and what is known of them."""

    rows: Tensor
    """`[num_rows, hidden_size]` before any norm."""
    layout: Layout
    choices: Sequence[Choice]
    """Per sequence."""
    router_biases: npt.NDArray[np.float64]
    """`[num_seqs]` added to the router's logits per level of compression."""
    device_inputs: DeviceInputs | None = None
    """The layout and the forced experts on the device, where they are there already."""
    scores: AttentionScores | None = None
    """None where the backend has none."""

    @property
    def forced(self) -> IntArray:
        """`[num_seqs]` expert to take, -1 where the router decides."""
        return forced_experts(self.choices)


@dataclass(frozen=True)
class Outcome:
    """What a boundary did with one sequence."""

    experts: Sequence[int | None] = ()
    """Expert per image, None where the image was skipped."""
    kernels: Sequence[tuple[int, int] | None] = ()
    """Kernel per image."""
    probs: Sequence[float] | None = None
    """Of the router; None where none ran or all images were skipped."""
    kept: Sequence[IntArray | None] = ()
    """Ascending rows of each image that were kept, counted among those that reached the boundary; None where none was
    left out by its number."""
    choice: Choice = field(default_factory=Choice)
    """What makes the boundary do the same again."""
    failure: RequestError | None = None
    """Why what is computed from the sequence's rows means nothing."""


class BoundaryTrace(Protocol):
    """What a boundary did with a batch."""

    def select(self, kept: npt.NDArray[np.intp]) -> Self:
        """Of these sequences alone."""

    def outcome(self, index: int) -> Outcome:
        """Of one sequence."""


class Reduced(Protocol):
    """Reduced rows on their way on the device. The host waits for what it asks."""

    @property
    def rows(self) -> Tensor:
        """`[at least num_rows, hidden_size]`: the rows of the next stage, and anything after them."""

    @property
    def next_keys(self) -> Tensor | None:
        """`[num_rows, num_kv_heads * head_dim]` keys of the rows in the next stage's first layer, not rotated; None
        where the boundary has not computed them."""

    @property
    def device_layout(self) -> DeviceLayout:
        """Of the next stage; known to the device without the host."""

    @property
    def has_cached_rows(self) -> bool:
        """Whether rows of some sequence, before those here, are in the cache."""

    @property
    def num_rows(self) -> int:
        """Of the next stage."""

    def finish(self) -> tuple[Layout, BoundaryTrace]:
        """The next stage's layout on the host, and what was done."""


class Reducer(Protocol):
    """Reduces visual rows at one boundary."""

    @property
    def reads_queries(self) -> bool:
        """Whether `AttentionScores.here` is asked for, which takes the stage's last queries."""

    def most_rows(self, layout: Layout, choices: Sequence[Choice]) -> IntArray:
        """`[num_seqs]` rows that attention sees after the boundary at most.

        Args:
            layout: before the boundary.
            choices: per sequence.
        """

    def reduce(self, output: StageOutput) -> Reduced | None:
        """Reduces without waiting for the device; None where nothing is reduced."""


@dataclass(frozen=True)
class NothingReduced:
    """The trace of a boundary that skipped every sequence."""

    images: IntArray
    """`[num_seqs]` images of each sequence."""

    @classmethod
    def of(cls, layout: Layout) -> NothingReduced:
        return cls(np.diff(layout.cu_images))

    def select(self, kept: npt.NDArray[np.intp]) -> NothingReduced:
        """Of these sequences alone."""
        return NothingReduced(self.images[kept])

    def outcome(self, index: int) -> Outcome:
        """Every image was skipped."""
        skipped = (None,) * int(self.images[index])
        return Outcome(experts=skipped, kernels=skipped)


def forced_experts(choices: Sequence[Choice]) -> IntArray:
    """`[num_seqs]` int32 expert of each choice."""
    return np.asarray([choice.expert for choice in choices], dtype=np.int32)
