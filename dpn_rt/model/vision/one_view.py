"""What configurations share of encoders that see each image as one square view."""

from __future__ import annotations

from abc import ABC, abstractmethod

from dpn_rt.errors import ImageError
from dpn_rt.model.reduction.grid import Grid
from dpn_rt.model.vision.visual_input import ViewShape, VisualInput, check_view_shapes


class OneView(ABC):
    """Part of a `VisionEncoderConfig`: every image is one view, and has the same grid of visual tokens."""

    image_size: int
    """Pixels per side of the view."""

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """Visual tokens of every image."""

    @property
    @abstractmethod
    def num_visual_tokens(self) -> int:
        """Rows that every image puts into the prompt."""

    @property
    def max_visual_tokens(self) -> int:
        """The same for all images."""
        return self.num_visual_tokens

    @property
    def view_shapes(self) -> tuple[ViewShape, ...]:
        """The pixel values."""
        return ((3, self.image_size, self.image_size),)

    def check_views(self, image: VisualInput) -> None:
        """Refuse an image that is not one view `[3, image_size, image_size]` with this encoder's visual tokens.

        Raises:
            ImageError: with the shapes or grids found and expected.
        """
        check_view_shapes(image, self.view_shapes)
        if (image.grid, image.num_visual_tokens) != (self.grid, self.num_visual_tokens):
            raise ImageError(
                f"image: {image.num_visual_tokens} visual tokens on the grid {image.grid}, expected "
                f"{self.num_visual_tokens} on {self.grid}"
            )
