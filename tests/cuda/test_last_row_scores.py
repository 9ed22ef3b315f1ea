from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import HALVES, Guards, assert_near
from tests.cuda.emulated import KernelError, Kernels
from tests.ops.last_row_cases import HEADS, OTHER_HEADS, RAGGED, Batch, Heads, Prompt, Segment, int32, one_image, text

SEGMENTS = ("segment_queries", "segment_starts", "cu_scores")


def run(kernels: Kernels, guards: Guards, batch: Batch, is_paged: bool, unused_blocks: int = 0) -> Tensor:
    """With room for more scores than there are."""
    if is_paged:
        arguments = batch.paged_arguments(7)
        table = arguments["block_table"]
        assert isinstance(table, Tensor)
        # Unused blocks make the host expect longer sequences: parts without keys.
        arguments["block_table"] = torch.cat([table, table.new_full((len(table), unused_blocks), -1)], 1)
        most_keys = 7 * arguments["block_table"].shape[1]
    else:
        arguments, most_keys = dict(batch.packed_arguments), len(batch.k)
    put = {name: guards.put(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    size = kernels.number("last_row_scores_workspace_size", put["q"], batch.heads.keys, most_keys)
    workspace = guards.poisoned(size, dtype=torch.float32)
    out = guards.poisoned(batch.num_scores + 3, dtype=torch.float32)
    op = kernels.last_row_scores_paged if is_paged else kernels.last_row_scores
    first_keys = None if batch.first_keys is None else guards.put(batch.first_keys)
    op(out, *put.values(), first_keys, batch.scale, workspace)
    assert out[batch.num_scores :].isnan().all(), "scores after the batch were written"
    return out[: batch.num_scores]


def check(kernels: Kernels, guards: Guards, batch: Batch, unused_blocks: int = 0) -> None:
    reference = batch.reference(torch.float64)
    for is_paged in (True, False):
        assert_near(run(kernels, guards, batch, is_paged, unused_blocks), reference, 16.0, 1e-6)


@pytest.mark.parametrize("heads", [*HEADS, *OTHER_HEADS], ids=str)
def test_any_number_of_images(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, heads: Heads
) -> None:
    check(kernels, guards, Batch(RAGGED, heads, dtype, generator))


@pytest.mark.parametrize("heads", [Heads(4, 1, 128), Heads(2, 2, 96), Heads(17, 1, 16)], ids=str)
def test_float32(kernels: Kernels, guards: Guards, generator: torch.Generator, heads: Heads) -> None:
    check(kernels, guards, Batch(RAGGED, heads, torch.float32, generator))


@pytest.mark.parametrize("unused_blocks", [0, 100])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 575, 576])
def test_parts_of_the_keys(
    kernels: Kernels, guards: Guards, generator: torch.Generator, rows: int, unused_blocks: int
) -> None:
    for dtype in HALVES:
        check(kernels, guards, Batch([one_image(rows)], Heads(8, 2, 64), dtype, generator), unused_blocks)


@pytest.mark.parametrize("unused_blocks", [0, 100])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_windows(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, share: float, unused_blocks: int
) -> None:
    prompts = [one_image(600), text(9), one_image(1), Prompt(((5, 70), (5, 70)), 0)]
    batch = Batch(prompts, Heads(8, 2, 64), dtype, generator)
    batch.first_keys = int32([int(share * (length - 1)) for length in batch.lengths])
    check(kernels, guards, batch, unused_blocks)


def test_segments_in_any_order(kernels: Kernels, guards: Guards, generator: torch.Generator) -> None:
    batch = Batch([one_image(100), one_image(50), text(9)], Heads(4, 2, 64), torch.bfloat16, generator)
    batch.segments = [Segment(1, 20, 60), Segment(0, 0, 160), Segment(1, 0, 110), Segment(0, 30, 0), Segment(0, 159, 1)]
    check(kernels, guards, batch)


def test_more_segments_than_a_warp(kernels: Kernels, guards: Guards, generator: torch.Generator) -> None:
    prompts = [*[Prompt(((1, 3), (0, 2)), 1)] * 40, text(5), one_image(4)]
    check(kernels, guards, Batch(prompts, Heads(2, 1, 32), torch.float16, generator))


def test_nan_stays_in_its_sequence(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype
) -> None:
    batch = Batch([one_image(20), one_image(30), one_image(20)], Heads(4, 2, 64), dtype, generator)
    batch.k[80 + 89, 1, 5] = float("nan")  # a row of text
    for is_paged in (True, False):
        out = run(kernels, guards, batch, is_paged)
        assert out[20:50].isnan().all()
        assert out[:20].isfinite().all()
        assert out[50:].isfinite().all()


@pytest.mark.parametrize("prompts", [[], [text(0)], [text(5), text(0)], [Prompt(((3, 0),), 2)]], ids=str)
def test_nothing_to_score(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, prompts: list[Prompt]
) -> None:
    batch = Batch(prompts, Heads(2, 1, 16), dtype, generator)
    for is_paged in (True, False):
        assert run(kernels, guards, batch, is_paged).shape == (0,)


def test_what_the_gpu_cannot_take_is_refused(kernels: Kernels, generator: torch.Generator) -> None:
    batch = Batch([one_image(3)], Heads(2, 1, 16), torch.float16, generator)
    arguments, out = batch.packed_arguments, torch.zeros(3)
    needed = kernels.number("last_row_scores_workspace_size", batch.q, 1, len(batch.k))
    with pytest.raises(KernelError, match="last_row_scores: workspace is None"):
        kernels.last_row_scores(out, *arguments.values(), None, 1.0, None)
    with pytest.raises(KernelError, match=f"workspace_size is {needed - 1}, expected {needed} to"):
        kernels.last_row_scores(out, *arguments.values(), None, 1.0, torch.zeros(needed - 1))
    wide = Batch([one_image(3)], Heads(1, 1, 136), torch.float32, generator).packed_arguments
    with pytest.raises(KernelError, match="head_dim on cuda is 136, expected 8 to 128"):
        kernels.last_row_scores(out, *wide.values(), None, 1.0, torch.zeros(1000))
    odd = torch.zeros(63, 1, 20, dtype=torch.float16)[..., 4:]
    with pytest.raises(KernelError, match="k is not aligned"):
        kernels.last_row_scores(out, *{**arguments, "k": odd}.values(), None, 1.0, torch.zeros(1000))
