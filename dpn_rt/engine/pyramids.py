"""What the stages and boundaries did with a sequence, as users are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpn_rt.format.config import ModelConfig
from dpn_rt.format.flops import prefill_flops
from dpn_rt.model.layout import Layout
from dpn_rt.model.reduction.reducer import Outcome
from dpn_rt.model.reduction.reduction import Grid
from dpn_rt.outputs import PrefillFlops, Pyramid
from dpn_rt.prompts.processor import ProcessedPrompt


def pyramid_of(index: int, prompt: ProcessedPrompt, layouts: Sequence[Layout], outcomes: Sequence[Outcome]) -> Pyramid:
    """The way of one sequence through the stages; experts, kernels and grids are those of its first image.

    Args:
        index: of the sequence in the layouts.
        prompt: of the sequence.
        layouts: of the batch, per stage.
        outcomes: of the sequence, per boundary.
    """
    outside_grids = sum(image.num_visual_tokens - image.grid[0] * image.grid[1] for image in prompt.images)
    return Pyramid(
        experts=[next(iter(outcome.experts), None) for outcome in outcomes],
        kernels=[next(iter(outcome.kernels), None) for outcome in outcomes],
        probs=[None if outcome.probs is None else list(outcome.probs) for outcome in outcomes],
        visual_tokens=[int(layout.num_visual[index]) + outside_grids for layout in layouts],
        kv_lengths=[int(layout.kv_lengths[index]) for layout in layouts],
        grids=[_grid(layout, index) for layout in layouts],
    )


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
    dense = prefill_flops(model, [prompt.num_rows] * len(pyramid.kv_lengths))
    return replace(pyramid, flops=PrefillFlops(flops, dense, 1 - flops / dense))


def _grid(layout: Layout, index: int) -> Grid | None:
    first, end = layout.cu_images[index : index + 2]
    return None if first == end else (int(layout.grids[first, 0]), int(layout.grids[first, 1]))
