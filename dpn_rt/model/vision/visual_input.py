"""One image, ready for the model: views for the vision encoder, or embeddings that take the encoder's place."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from dpn_rt.errors import ImageError
from dpn_rt.model.reduction.before_llm import known_tokens, newlines_before_llm, segments_before_llm
from dpn_rt.model.reduction.grid import Grid, IntArray, Segments, as_grid, num_visual
from dpn_rt.model.reduction.newlines import NO_NEWLINES
from dpn_rt.model.reduction.step import Step

ViewShape = tuple[int, ...]


@dataclass(frozen=True)
class Tiling:
    """How the crops of a large image after the first, which is the overview, cover it."""

    tiles: Grid
    """Rows and columns of tiles."""
    unpadded: Grid
    """Rows and columns of visual tokens that lie on the image, in the middle of those of all tiles."""


@dataclass(frozen=True, eq=False)
class BeforeLlm:
    """Reduction of an image before the decoder."""

    source: VisualInput
    """The image with all its rows."""
    step: Step
    known: IntArray | None
    """`[n]` ascending visual tokens that stay; None where they are pooled, or their values decide."""


@dataclass(frozen=True, eq=False)
class VisualInput:
    """One image: either views or embeddings."""

    views: tuple[Tensor, ...]
    """Float32 tensors on the CPU, in the shapes that the encoder's configuration names; none if `embeds` is given."""
    embeds: Tensor | None
    """`[num_rows, hidden_size]` decoder rows, in the model's dtype; None if there are views."""
    segments: Segments
    """Grids of the visual tokens."""
    num_rows: int
    """Rows that replace the placeholder in the prompt."""
    tiling: Tiling | None = None
    """None for an image of one crop."""
    before_llm: BeforeLlm | None = None
    """What is done with the encoder's rows before the decoder sees them; segments and rows are those after it."""
    source_newlines: IntArray = field(default_factory=lambda: NO_NEWLINES)
    """`[num_newlines]` ascending rows that are no visual tokens but end lines of the grid, before anything is left
    out; all of them stay."""

    @classmethod
    def of_views(cls, views: Sequence[Tensor], grid: Grid, num_rows: int) -> VisualInput:
        """An image of one crop for the encoder, with its key."""
        return cls(tuple(views), None, (grid,), num_rows).with_key()

    @classmethod
    def of_crops(
        cls, views: Sequence[Tensor], tiling: Tiling | None, segments: Segments, newline_rows: IntArray
    ) -> VisualInput:
        """An image with newline rows for the encoder, with its key."""
        num_rows = num_visual(segments) + len(newline_rows)
        return cls(tuple(views), None, segments, num_rows, tiling, source_newlines=newline_rows).with_key()

    @classmethod
    def of_embeds(cls, embeds: Tensor, grid: Grid) -> VisualInput:
        """Decoder rows `[num_rows, hidden_size]` for an image. Their key is computed when it is first asked for."""
        return cls((), embeds, (grid,), embeds.shape[0])

    @cached_property
    def key(self) -> bytes:
        """SHA-256 of the content, the grids and what is done before the decoder: equal images have equal keys.

        The whole content is hashed where it is read for the first time.
        """
        before = self.before_llm
        if before is not None:
            digest = hashlib.sha256(b"reduced " + before.source.key + before.step.spec.encode() + b"\0")
            digest.update(b"" if before.known is None else before.known.tobytes())
            return digest.digest()
        content = self.views if self.embeds is None else (self.embeds,)
        form = f"{self.tiling} {self.source_newlines.tolist()} {self.segments} {[list(part.shape) for part in content]}"
        digest = hashlib.sha256(f"{'views' if self.views else 'embeds'} {form} ".encode())
        for part in content:
            digest.update(part.contiguous().view(-1).view(torch.uint8).numpy(force=True).data)
        return digest.digest()

    def with_key(self) -> VisualInput:
        """The same, with its key computed now: in the thread that prepares images, not in the engine's."""
        _ = self.key
        return self

    @property
    def handle(self) -> Hashable:
        """What a prefill knows the image by: equal pixels have equal handles, so that they are encoded once.

        Embeddings need no encoder, so their content is not compared.
        """
        return self.key if self.embeds is None else id(self)

    @property
    def grid(self) -> Grid:
        """Rows and columns of the visual tokens; (1, n) where they are no grid, or several."""
        return as_grid(self.segments)

    @property
    def num_newlines(self) -> int:
        """Rows that are newlines."""
        return len(self.source_newlines)

    @property
    def num_visual_tokens(self) -> int:
        """Rows that are no newlines."""
        return self.num_rows - self.num_newlines

    def newline_rows(self, kept: IntArray | None) -> IntArray:
        """`[num_newlines]` ascending rows that are newlines.

        Args:
            kept: `[num_visual_tokens]` the encoder's visual tokens that are left; None for all, or pooled ones.
        """
        before = self.before_llm
        if before is None or not self.num_newlines:
            return self.source_newlines
        source = before.source
        return newlines_before_llm(before.step, source.segments, source.num_rows, self.source_newlines, kept)

    @property
    def given(self) -> VisualInput:
        """The image with all its rows."""
        return self if self.before_llm is None else self.before_llm.source

    def reduced(self, step: Step, image: int, kept: IntArray | None) -> VisualInput:
        """The image with fewer rows.

        Args:
            step: whose only boundary is before the decoder.
            image: place among the images of its prompt.
            kept: `[n]` ascending visual tokens that are to stay; None: the step decides.
        """
        known = known_tokens(step, image, self.segments, kept)
        segments = segments_before_llm(step, self.segments)
        return replace(
            self,
            segments=segments,
            num_rows=num_visual(segments) + self.num_newlines,
            before_llm=BeforeLlm(self, step, known),
        )

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
