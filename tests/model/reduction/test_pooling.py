"""A boundary over a ragged batch against the published rules, applied to one sample at a time with torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt.model.layout import Layout
from dpn_rt.model.reduction.pooling import Boundary, BoundaryTrace, join_traces, untouched
from dpn_rt.model.reduction.pooling_config import SKIPPED, BoundaryConfig, PoolingConfig, PoolingFunction

HIDDEN = 24
MISFIT = -2
KERNEL_SETS = [((1, 1), (1, 2), (2, 2)), ((1, 1), (2, 2), (4, 4)), ((2, 1),), ((3, 2), (1, 1))]


@dataclass(frozen=True)
class Prompt:
    num_text_before: int
    num_text_after: int
    grid: tuple[int, int] | None
    router_offsets: tuple[int, ...]

    @property
    def num_visual(self) -> int:
        return self.grid[0] * self.grid[1] if self.grid else 0

    @property
    def num_rows(self) -> int:
        return self.num_text_before + self.num_visual + self.num_text_after

    @property
    def image_start(self) -> int | None:
        return self.num_text_before if self.grid else None

    @property
    def router_rows(self) -> np.ndarray:
        first = self.num_text_before + self.num_visual
        return np.array([first + offset for offset in self.router_offsets] if self.grid else [], dtype=np.int32)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    after = draw(st.integers(1, 5))
    grid = draw(st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)))
    offsets = draw(st.lists(st.integers(0, after - 1), min_size=1, max_size=2, unique=True))
    return Prompt(draw(st.integers(0, 4)), after, grid, tuple(sorted(offsets)))


def make_boundary(
    kernels: tuple[tuple[int, int], ...], adaptive: bool, function: PoolingFunction, seed: int
) -> tuple[Boundary, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "boundaries.0.router.norm.weight": torch.randn(HIDDEN, generator=generator),
        "boundaries.0.router.norm.bias": torch.randn(HIDDEN, generator=generator),
        "boundaries.0.router.hidden.weight": torch.randn(HIDDEN // 4, HIDDEN, generator=generator),
        "boundaries.0.router.predictor.weight": 10 * torch.randn(len(kernels), HIDDEN // 4, generator=generator),
    }
    for expert, (height, width) in enumerate(kernels):
        weights[f"boundaries.0.experts.{expert}.weight"] = torch.randn(height * width, HIDDEN, generator=generator)
    config = PoolingConfig((BoundaryConfig(0, kernels),), "adaptive" if adaptive else "random", function)
    return Boundary(config, 0, weights), weights


def expected_sample(
    x: torch.Tensor,
    prompt: Prompt,
    kernels: tuple[tuple[int, int], ...],
    adaptive: bool,
    function: str,
    forced: int,
    weights: dict[str, torch.Tensor],
    bias: float,
) -> tuple[torch.Tensor, int, tuple[int, int] | None]:
    """Rows, expert (-1: skipped, -2: too large for the grid) and grid of one sample, from the text of the rules."""
    largest = max(k[0] * k[1] for k in kernels)
    too_small = prompt.num_visual < max(16, largest)
    if prompt.grid is None or too_small:
        return x, -1, prompt.grid
    expert, scale = max(forced, 0), 1.0
    if adaptive:
        row = x[prompt.router_rows].mean(0)
        w = {name.split("router.")[-1]: tensor.double() for name, tensor in weights.items()}
        row = functional.layer_norm(row, row.shape, w["norm.weight"], w["norm.bias"], 1e-5)
        logits = functional.gelu(row @ w["hidden.weight"].T) @ w["predictor.weight"].T
        levels = torch.tensor([sorted({a * b for a, b in kernels}).index(h * v) for h, v in kernels])
        probs = ((logits + bias * levels) / 10).softmax(0)
        expert = int(probs.argmax()) if forced < 0 else forced
        scale = float(probs[expert])
    height, width = prompt.grid
    kernel = kernels[expert]
    if height < kernel[0] or width < kernel[1]:
        return x, MISFIT, prompt.grid
    start, end = prompt.num_text_before, prompt.num_text_before + prompt.num_visual
    grid = x[start:end].view(height, width, HIDDEN).permute(2, 0, 1)[None]
    if function == "max":
        pooled = functional.max_pool2d(grid, kernel)
    elif function == "avg":
        pooled = functional.avg_pool2d(grid, kernel)
    else:
        weight = weights[f"boundaries.0.experts.{expert}.weight"].double().T.reshape(HIDDEN, 1, *kernel)
        pooled = functional.conv2d(grid, weight, stride=kernel, groups=HIDDEN)
    rows = pooled[0].flatten(1).T * scale
    return torch.cat((x[:start], rows, x[end:])), expert, (pooled.shape[2], pooled.shape[3])


def apply(
    boundary: Boundary, x: torch.Tensor, layout: Layout, forced: np.ndarray, biases: np.ndarray | None = None
) -> tuple[torch.Tensor, Layout, BoundaryTrace]:
    """Rows and layout of the next stage, and what was done."""
    behind = boundary.queue(x, layout, forced, biases)
    if behind is None:
        return x, layout, untouched(layout)
    rows, queued = behind
    return rows[: queued.num_rows], *queued.finish()


@settings(max_examples=120, deadline=None)
@given(
    batch=st.lists(prompts(), min_size=1, max_size=5),
    kernels=st.sampled_from(KERNEL_SETS),
    adaptive=st.booleans(),
    function=st.sampled_from(["max", "avg", "conv"]),
    seed=st.integers(0, 2**31),
)
def test_boundary(
    batch: list[Prompt], kernels: tuple[tuple[int, int], ...], adaptive: bool, function: PoolingFunction, seed: int
) -> None:
    random = np.random.default_rng(seed)
    boundary, weights = make_boundary(kernels, adaptive, function, seed)
    layout = Layout.of_prompts(batch)
    x = torch.from_numpy(random.standard_normal((int(layout.cu_seqlens[-1]), HIDDEN)).astype(np.float32))
    forced = random.integers(-1 if adaptive else 0, len(kernels), len(batch)).astype(np.int32)
    biases = random.choice([-30.0, 0.0, 5.0, 200.0], len(batch))
    rows, pooled, trace = apply(boundary, x, layout, forced, biases)
    assert pooled.cu_seqlens[-1] == len(rows)
    longest = boundary.longest(layout, forced)
    assert (longest >= pooled.kv_lengths).all()
    known = (forced >= 0) | (trace.experts == SKIPPED)
    assert longest[known].tolist() == pooled.kv_lengths[known].tolist()
    assert longest[~known].tolist() == layout.kv_lengths[~known].tolist()
    for i, prompt in enumerate(batch):
        sample = x[layout.cu_seqlens[i] : layout.cu_seqlens[i + 1]].double()
        expected, expert, grid = expected_sample(
            sample, prompt, kernels, adaptive, function, int(forced[i]), weights, biases[i]
        )
        assert trace.misfits[i] == (expert == MISFIT)
        assert expert == MISFIT or trace.experts[i] == expert
        assert tuple(pooled.grids[i]) == (grid or (0, 0))
        actual = rows[pooled.cu_seqlens[i] : pooled.cu_seqlens[i + 1]]
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
        # The router's rows are still the same rows of text.
        moved = pooled.router_rows_from(pooled.cu_seqlens)[pooled.cu_router_rows[i] : pooled.cu_router_rows[i + 1]]
        assert torch.equal(rows[moved.tolist()], x[(prompt.router_rows + layout.cu_seqlens[i]).tolist()])
        positions = pooled.positions[pooled.cu_seqlens[i] : pooled.cu_seqlens[i + 1]]
        assert positions.tolist() == list(range(len(actual)))
    assert_the_same_padded(boundary, x, layout, forced, biases, (rows, pooled, trace))


def assert_the_same_padded(
    boundary: Boundary,
    x: torch.Tensor,
    layout: Layout,
    forced: np.ndarray,
    biases: np.ndarray,
    packed: tuple[torch.Tensor, Layout, BoundaryTrace],
) -> None:
    """Bit by bit, whatever lies behind each sequence."""
    longest = int(layout.lengths.max())
    padded = torch.full((layout.num_seqs, longest, HIDDEN), float("nan"))
    for found, part in zip(padded, x.split(layout.lengths.tolist()), strict=True):
        found[: len(part)] = part
    rows, pooled, trace = boundary.apply_padded(padded, layout, forced, biases)
    wanted_rows, wanted_layout, wanted_trace = packed
    assert rows.shape[1] == pooled.lengths.max()
    assert pooled.lengths.tolist() == wanted_layout.lengths.tolist()
    assert pooled.router_rows.tolist() == wanted_layout.router_rows.tolist()
    assert trace.experts.tolist() == wanted_trace.experts.tolist()
    assert trace.misfits.tolist() == wanted_trace.misfits.tolist()
    assert (trace.probs is None) == (wanted_trace.probs is None)
    for found, part in zip(rows, wanted_rows.split(pooled.lengths.tolist()), strict=True):
        assert torch.equal(found[: len(part)], part)
        assert (trace.experts == SKIPPED).all() or not found[len(part) :].any()


def test_traces_are_joined_in_the_order_of_the_batch() -> None:
    def part(experts: list[int], probs: list[float] | None) -> BoundaryTrace:
        rows = None if probs is None else np.array([[p, 1 - p] for p in probs], dtype=np.float32)
        return BoundaryTrace(np.array(experts, dtype=np.int32), rows, np.array([e == 1 for e in experts]))

    order = np.array([2, 0, 1])
    joined = join_traces([part([1, 0], [0.25, 0.5]), part([SKIPPED], None)], order)
    assert joined.experts.tolist() == [SKIPPED, 1, 0]
    assert joined.misfits.tolist() == [False, True, False]
    assert joined.probs is not None and joined.probs.tolist() == [[0, 0], [0.25, 0.75], [0.5, 0.5]]
    assert join_traces([part([0], None), part([SKIPPED, 1], None)], order).probs is None


@settings(max_examples=200, deadline=None)
@given(
    prompt=prompts(),
    kernels=st.lists(st.sampled_from(KERNEL_SETS), min_size=1, max_size=3),
    data=st.data(),
)
def test_most_rows_bound_every_route(
    prompt: Prompt, kernels: list[tuple[tuple[int, int], ...]], data: st.DataObject
) -> None:
    config = PoolingConfig(tuple(BoundaryConfig(i, k) for i, k in enumerate(kernels)), "random")
    taken = [data.draw(st.integers(0, len(k) - 1)) for k in kernels]
    known = [data.draw(st.sampled_from([-1, expert])) for expert in taken]
    layout = Layout.of_prompts([prompt])
    x, lengths = torch.zeros(prompt.num_rows, HIDDEN), [prompt.num_rows]
    for index, expert in enumerate(taken):
        x, layout, _ = apply(Boundary(config, index, {}), x, layout, np.array([expert], dtype=np.int32))
        lengths.append(int(layout.lengths[0]))
    bound = config.most_rows(prompt.num_rows, [prompt.grid] if prompt.grid else [], known)
    assert all(length <= most for length, most in zip(lengths, bound, strict=True))
    assert config.most_rows(prompt.num_rows, [prompt.grid] if prompt.grid else [], taken) == tuple(lengths)
