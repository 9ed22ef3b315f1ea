"""How clearly a reduction chooses its rows: of near ties another order of additions may keep another row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.model.reduction import before_llm
from dpn_rt.outputs import RequestOutput

WIDE = 1e-4
"""Relative. Scores of two right float32 computations differ by some millionths, and one draw in a hundred is closer."""
Drawn = TypeVar("Drawn")


def draw_clear_choices(
    draw: Callable[[], Drawn], answer: Callable[[Drawn], RequestOutput]
) -> tuple[Drawn, RequestOutput]:
    """A prompt, with its answer, whose kept rows differ clearly from those left out; draws until there is one."""
    while True:
        drawn = draw()
        with recorded_margins() as margins:
            output = answer(drawn)
        if min(margins, default=1.0) > WIDE:
            return drawn, output


@contextmanager
def recorded_margins() -> Iterator[list[float]]:
    """Collects, for every choice of rows, by how much the worst row kept is better than the best one left out."""
    margins: list[float] = []
    top_k, most_diverse = ops.segmented_top_k, before_llm.most_diverse

    def noting_top_k(scores: Tensor, cu_scores: Tensor, cu_kept: Tensor, **options: Tensor) -> Tensor:
        counts = cu_kept.diff().tolist()
        for (start, end), count in zip(pairwise(cu_scores.tolist()), counts, strict=True):
            margins.extend(_margin(scores[start:end].double(), count))
        return top_k(scores, cu_scores, cu_kept, **options)

    def noting_most_diverse(rows: Tensor, count: int) -> Tensor:
        picked = most_diverse(rows, count)
        unit = torch.nn.functional.normalize(rows.double(), dim=1)
        distances = (1 - unit @ unit.T).fill_diagonal_(torch.inf)
        for step in range(count):
            against, others = picked[:step], torch.ones(len(rows), dtype=torch.bool).index_fill(0, picked[:step], False)
            nearest = (distances[:, against] if step else distances).amin(dim=1)
            margins.extend(_margin(nearest[others], 1))
        return picked

    with (
        mock.patch.object(ops, "segmented_top_k", noting_top_k),
        mock.patch.object(before_llm, "most_diverse", noting_most_diverse),
    ):
        yield margins


def _margin(scores: Tensor, count: int) -> list[float]:
    if not 0 < count < len(scores):
        return []
    best = scores.sort(descending=True).values
    if best[count - 1].isinf():  # rows that always stay are all that stay
        return []
    if best[count - 1] == best[count] == 0:  # of rows before a sliding window: the first of them are kept
        return []
    return [((best[count - 1] - best[count]) / best[count - 1]).item()]
