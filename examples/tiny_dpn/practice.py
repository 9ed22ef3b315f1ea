"""Pictures of which the decoder gets few rows beside those that matter for a question.

What is small is found far sooner among few rows: the more rows there are, the less of the gradient reaches those that
matter. What finds it there finds it in whole pictures too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from examples.tiny_dpn.data import Sample
from examples.tiny_dpn.patch_labels import has_shape, has_small_print
from examples.tiny_dpn.scenes import Scene

OTHERS_KEPT = 0.1
"""Share of the other rows that stays."""


@dataclass(frozen=True, slots=True)
class Practice:
    """What is practised: questions of these kinds, on these patches."""

    kinds: tuple[str, ...]
    matters: Callable[[Scene], torch.Tensor]

    def rows(self, sample: Sample) -> torch.Tensor:
        """[patches] bool: the rows that the decoder gets; others by chance."""
        matters = self.matters(sample.scene)
        return matters | (torch.rand(len(matters)) < OTHERS_KEPT)


PRACTICES = (
    Practice(("number", "word", "handwritten"), has_small_print),
    Practice(("circle", "count", "color", "side"), has_shape),
)


def practice_of(index: int) -> Practice:
    """Practices take turns."""
    return PRACTICES[index % len(PRACTICES)]
