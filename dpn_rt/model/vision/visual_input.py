"""One image, ready for the model: views for the vision encoder, or embeddings that take the encoder's place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dpn_rt.errors import ImageError
from dpn_rt.model.reduction.before_llm import known_rows
from dpn_rt.model.reduction.grid import Grid, IntArray
from dpn_rt.model.reduction.step import Step

ViewShape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class BeforeLlm:
    """Reduction of an image before the decoder."""

    source: VisualInput
    """The image with all its rows."""
    step: Step
    known: IntArray | None
    """`[n]` ascending rows that stay; None where rows are pooled, or their values decide."""


@dataclass(frozen=True, eq=False)
class VisualInput:
    """One image: either views or embeddings."""

    views: tuple[Tensor, ...]
    """Float32 tensors on the CPU, in the shapes that the encoder's configuration names; none if `embeds` is given."""
    embeds: Tensor | None
    """`[num_visual_tokens, hidden_size]` float32 decoder rows; None if there are views."""
    grid: Grid
    """Rows and columns of the visual tokens."""
    num_visual_tokens: int
    """Rows that replace the placeholder in the prompt."""
    key: bytes
    """SHA-256 of the content, the grid and what is done before the decoder: equal images have equal keys."""
    before_llm: BeforeLlm | None = None
    """What is done with the encoder's rows before the decoder sees them; grid and number of visual tokens are those
    after it."""

    @classmethod
    def of_views(cls, views: Sequence[Tensor], grid: Grid, num_visual_tokens: int) -> VisualInput:
        """An image for the encoder, with its key."""
        return cls(tuple(views), None, grid, num_visual_tokens, _key("views", views, grid))

    @classmethod
    def of_embeds(cls, embeds: Tensor, grid: Grid) -> VisualInput:
        """Decoder rows that stand for an image, with their key."""
        return cls((), embeds, grid, embeds.shape[0], _key("embeds", [embeds], grid))

    @property
    def given(self) -> VisualInput:
        """The image with all its rows."""
        return self if self.before_llm is None else self.before_llm.source

    def reduced(self, step: Step, image: int, kept: IntArray | None) -> VisualInput:
        """The image with fewer rows.

        Args:
            step: whose only boundary is before the decoder.
            image: place among the images of its prompt.
            kept: `[n]` ascending rows that are to stay; None: the step decides.
        """
        known = known_rows(step, image, self.grid, kept)
        grid = step.grid_after(0, self.grid, self.grid)
        digest = hashlib.sha256(b"reduced " + self.key + step.spec.encode() + b"\0")
        digest.update(b"" if known is None else known.tobytes())
        before = BeforeLlm(self, step, known)
        return VisualInput(self.views, self.embeds, grid, grid[0] * grid[1], digest.digest(), before)

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return sum(view.nbytes for view in self.views) + (0 if self.embeds is None else self.embeds.nbytes)


def check_view_shapes(image: VisualInput, shapes: Sequence[ViewShape]) -> None:
    """Refuse an image unless it has exactly one view of each shape, in this order.

    Raises:
        ImageError: with the shapes found and expected.
    """
    if [tuple(view.shape) for view in image.views] != list(shapes):
        expected = _describe(shapes)
        raise ImageError(f"image: {describe_content(image)}, expected pixels {expected}")


def describe_content(image: VisualInput) -> str:
    """What an image consists of, for error messages."""
    return f"pixels {_describe([view.shape for view in image.views])}" if image.views else "embeddings"


def _describe(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join(str(list(shape)) for shape in shapes)


def _key(kind: str, content: Sequence[Tensor], grid: Grid) -> bytes:
    header = f"{kind} {grid} {[list(tensor.shape) for tensor in content]} "
    digest = hashlib.sha256(header.encode())
    for tensor in content:
        digest.update(tensor.contiguous().numpy().data)
    return digest.digest()
