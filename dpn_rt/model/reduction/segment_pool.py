"""Uniform pooling of an image's visual tokens, each segment by itself.

A pooled token takes the place of its window's first token. So pooling keeps rows, as other methods do, and writes other
values into them; newline rows stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.device.transfer import upload
from dpn_rt.model.reduction.grid import IntArray, Segments, num_visual, pooled_grid
from dpn_rt.model.reduction.pool import Pool

Upload = Callable[..., Sequence[Tensor]]
"""Arrays -> tensors where the rows are."""


def first_tokens(segments: Segments, step: Pool) -> IntArray:
    """`[num_pooled]` the first visual token of each window; all tokens of a segment into which the kernel does not fit.

    Args:
        segments: of one image.
        step: what is done with it.
    """
    found: list[IntArray] = []
    start = 0
    for height, width in segments:
        (rows, columns), fits = pooled_grid((height, width), step.kernel)
        numbers = start + np.arange(height * width, dtype=np.int32).reshape(height, width)
        kernel_height, kernel_width = step.kernel
        windows = numbers[: rows * kernel_height : kernel_height, : columns * kernel_width : kernel_width]
        found.append((windows if fits else numbers).reshape(-1))
        start += height * width
    return np.concatenate(found)


def pooled_tokens(tokens: Tensor, images: Sequence[tuple[Segments, Pool]], upload: Upload) -> Tensor:
    """What is left of the visual tokens of some images.

    Args:
        tokens: `[num_visual of all images, hidden_size]`, one image after the other.
        images: segments and what is done with them; the function is the same for all.
        upload: to where the tokens are.

    Returns:
        `[num_pooled of all images, hidden_size]`.
    """
    grids = np.array([grid for segments, _ in images for grid in segments], dtype=np.int32)
    kernels = list(dict.fromkeys(step.kernel for _, step in images))
    fitting = [(step.kernel, pooled_grid(grid, step.kernel)) for segments, step in images for grid in segments]
    experts = np.array([kernels.index(kernel) if fits else -1 for kernel, (_, fits) in fitting], dtype=np.int32)
    sizes = grids.prod(axis=1, dtype=np.int32)
    num_pooled = sum(
        num_visual((after,)) if fits else int(size) for (_, (after, fits)), size in zip(fitting, sizes, strict=True)
    )
    cu_seqlens, cu_images, starts, before, chosen, kernel_table, out_cu_seqlens = upload(
        np.array([0, sizes.sum()], dtype=np.int32),
        np.array([0, len(grids)], dtype=np.int32),
        (np.cumsum(sizes) - sizes).astype(np.int32),
        grids,
        experts,
        np.array(kernels, dtype=np.int32),
        np.array([0, num_pooled], dtype=np.int32),
    )
    pooled = ops.pool(
        tokens,
        cu_seqlens,
        cu_images,
        starts,
        before,
        chosen,
        kernel_table,
        out_cu_seqlens,
        function=images[0][1].function,
    )
    return pooled[:num_pooled]


def upload_to(device: torch.device) -> Upload:
    """An `Upload` to a device, in one transfer that the host does not wait for."""
    return partial(upload, device)
