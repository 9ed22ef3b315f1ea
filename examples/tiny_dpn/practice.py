"""Practice pictures: the decoder gets the rows that matter for a question and few others.

The decoder learns to find small things far sooner among few rows: the more rows there are, the less of the gradient
reaches those that matter. It then finds them in whole pictures too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from examples.tiny_dpn.data import Sample
from examples.tiny_dpn.patch_labels import has_shape, has_small_print
from examples.tiny_dpn.scenes import Scene

OTHERS_KEPT = 0.1
"""Share of the other rows that the decoder gets."""


@dataclass(frozen=True, slots=True)
class Practice:
    """Questions of some kinds, and the patches that matter for them."""

    kinds: tuple[str, ...]
    matters: Callable[[Scene], torch.Tensor]

    def rows(self, sample: Sample) -> torch.Tensor:
        """[num_patches] bool: the rows that the decoder gets, those that matter and a random share of the others."""
        matters = self.matters(sample.scene)
        return matters | (torch.rand(len(matters)) < OTHERS_KEPT)


PRACTICES = (
    Practice(("number", "word", "handwritten"), has_small_print),
    Practice(("circle", "count", "color", "side"), has_shape),
)


def practice_of(index: int) -> Practice:
    """The practice of a picture; they alternate."""
    return PRACTICES[index % len(PRACTICES)]
