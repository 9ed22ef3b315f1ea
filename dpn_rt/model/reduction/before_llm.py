"""Reduction of one image's rows before the decoder sees them: it depends on the image alone, not on the question."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.model.reduction.divprune import DivPrune, most_diverse
from dpn_rt.model.reduction.grid import Grid, IntArray
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.step import Step


def known_rows(step: Step, image: int, grid: Grid, kept: IntArray | None) -> IntArray | None:
    """The rows of an image that stay, as far as numbers decide.

    Args:
        step: whose only boundary is before the decoder.
        image: its place among the images of its prompt.
        grid: of the image's rows.
        kept: `[n]` ascending rows that are to stay; None: the step decides.

    Returns:
        `[n]` ascending; None where rows are pooled, or their values decide.
    """
    if kept is not None:
        return kept
    height, width = step.grid_after(0, grid, grid)
    return step.choose(image, grid, height * width)


def reduce_image(rows: Tensor, step: Step, grid: Grid, known: IntArray | None) -> tuple[Tensor, IntArray | None]:
    """What is left of an image.

    Args:
        rows: `[height * width, hidden_size]`.
        step: whose only boundary is before the decoder.
        grid: of the rows.
        known: see `known_rows`.

    Returns:
        `[n, hidden_size]`, and the `[n]` ascending rows that these are; None where rows were pooled.
    """
    height, width = step.grid_after(0, grid, grid)
    if isinstance(step, Pool):
        return (rows if (height, width) == grid else _pooled(rows, step, grid)), None
    if known is None:
        assert isinstance(step, DivPrune), "other methods choose by numbers, or need the decoder"
        known = most_diverse(rows, height * width).sort().values.cpu().numpy().astype("int32")
    ids = torch.from_numpy(known.astype("int64")).to(rows.device)
    return rows.index_select(0, ids), known


def _pooled(rows: Tensor, step: Pool, grid: Grid) -> Tensor:
    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=rows.device)

    height, width = step.grid_after(0, grid, grid)
    return ops.pool(
        rows,
        cu_seqlens=ints(0, rows.shape[0]),
        cu_images=ints(0, 1),
        image_starts=ints(0),
        grids=ints(*grid)[None],
        experts=ints(0),
        kernels=ints(*step.kernel)[None],
        out_cu_seqlens=ints(0, height * width),
        function=step.function,
    )[: height * width]
