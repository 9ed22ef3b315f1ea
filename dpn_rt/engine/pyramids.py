"""What the stages and boundaries did with a sequence, as users are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpn_rt.format.config import ModelConfig
from dpn_rt.format.flops import prefill_flops
from dpn_rt.model.layout import Layout
from dpn_rt.model.reduction.grid import Grid, IntArray, pooled_grid
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.reducer import Outcome
from dpn_rt.model.reduction.step import BEFORE_LLM
from dpn_rt.outputs import PrefillFlops, Pyramid, ReductionStep
from dpn_rt.prompts.processor import ProcessedPrompt


def pyramid_of(
    index: int,
    prompt: ProcessedPrompt,
    layouts: Sequence[Layout],
    outcomes: Sequence[Outcome],
    kept_before_llm: Sequence[IntArray | None],
) -> Pyramid:
    """The way of one sequence through the stages; experts, kernels and grids are those of its first image.

    Args:
        index: of the sequence in the layouts.
        prompt: of the sequence.
        layouts: of the batch, per stage.
        outcomes: of the sequence, per boundary.
        kept_before_llm: per image, see `ImageResult`.
    """
    unseen = prompt.num_visual_tokens - int(layouts[0].num_visual[index])  # by boundaries
    grids = [_grid(layout, index) for layout in layouts]
    kernels = [next(iter(outcome.kernels), None) for outcome in outcomes]
    return Pyramid(
        experts=[next(iter(outcome.experts), None) for outcome in outcomes],
        kernels=kernels,
        probs=[None if outcome.probs is None else list(outcome.probs) for outcome in outcomes],
        visual_tokens=[int(layout.num_visual[index]) + unseen for layout in layouts],
        kv_lengths=[int(layout.kv_lengths[index]) for layout in layouts],
        grids=grids,
        kept=_kept(prompt, outcomes, kept_before_llm),
        steps=_steps(prompt, outcomes),
        reduction=None if prompt.reduction is None else prompt.reduction.spec,
        image_grid=prompt.images[0].given.segments[0] if prompt.images else None,
        image_segments=list(prompt.images[0].given.segments) if prompt.images else [],
        patches_per_token=_patches_per_token(prompt, kernels),
    )


def _steps(prompt: ProcessedPrompt, outcomes: Sequence[Outcome]) -> list[ReductionStep]:
    """Per boundary of the request's chain, as `_kept`."""
    if prompt.reduction is None or not prompt.images:
        return []
    stages = {
        outcome.choice.cut.layer: stage for stage, outcome in enumerate(outcomes, 1) if outcome.choice.cut is not None
    }
    return [ReductionStep(stages.get(cut.layer, 0), cut.step.spec) for cut in prompt.reduction.cuts]


def _patches_per_token(prompt: ProcessedPrompt, kernels: Sequence[Grid | None]) -> list[Grid]:
    """Per stage, of the first image's first segment: a kernel counts where it fitted."""
    if not prompt.images:
        return [(1, 1)] * (1 + len(kernels))
    before = prompt.images[0].before_llm
    first = before.step.kernel if before is not None and isinstance(before.step, Pool) else None
    sizes, size, grid = [], (1, 1), prompt.images[0].given.segments[0]
    for kernel in [first, *kernels]:
        if kernel is not None:
            after, fits = pooled_grid(grid, kernel)
            if fits:
                size, grid = (size[0] * kernel[0], size[1] * kernel[1]), after
        sizes.append(size)
    return sizes


def _kept(
    prompt: ProcessedPrompt, outcomes: Sequence[Outcome], kept_before_llm: Sequence[IntArray | None]
) -> list[list[int] | list[list[int]] | None]:
    """Per boundary of the request's chain the rows that it left of each image, by their numbers at the start."""
    if prompt.reduction is None:
        return [None] * len(outcomes)
    remaining: list[IntArray | None] = [None] * len(prompt.images)  # None: all, or what pooling made
    by_layer = {outcome.choice.cut.layer: outcome.kept for outcome in outcomes if outcome.choice.cut is not None}
    found: list[list[int] | list[list[int]] | None] = []
    for cut in prompt.reduction.cuts:
        kept = kept_before_llm if cut.layer == BEFORE_LLM else by_layer.get(cut.layer, ())
        pairs = list(zip(remaining, kept, strict=False))
        if not pairs or any(ids is None for _, ids in pairs):
            found.append(None)
            continue
        remaining = [ids if before is None else before[ids] for before, ids in pairs]
        lists = [[] if ids is None else ids.tolist() for ids in remaining]
        found.append(lists[0] if len(lists) == 1 else lists)
    return found


def reported_pyramid(pyramids: Sequence[Pyramid | None], prompt: ProcessedPrompt, model: ModelConfig) -> Pyramid:
    """The pyramid of a request, with what its prefill took.

    Args:
        pyramids: of its completions; None before their prefill.
        prompt: of the request.
        model: of the engine.
    """
    pyramid = next((each for each in pyramids if each is not None), None)
    if pyramid is None:
        return Pyramid([], [], [], [], [], [])
    flops = prefill_flops(model, pyramid.kv_lengths)
    dense = prefill_flops(model, [prompt.num_dense_rows] * len(pyramid.kv_lengths))
    return replace(pyramid, flops=PrefillFlops(flops, dense, 1 - flops / dense))


def _grid(layout: Layout, index: int) -> Grid | None:
    first, end = layout.cu_images[index : index + 2]
    return None if first == end else (int(layout.grids[first, 0]), int(layout.grids[first, 1]))
