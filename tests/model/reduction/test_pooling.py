"""A boundary over a batch of unequal samples, against the published rules applied with torch to each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt.device.host import HostDevice
from dpn_rt.model.layout import Layout
from dpn_rt.model.reduction.choice import Choice
from dpn_rt.model.reduction.pooling import PoolingReducer
from dpn_rt.model.reduction.pooling_config import SKIPPED, BoundaryConfig, PoolingConfig, PoolingFunction
from dpn_rt.model.reduction.reducer import BoundaryTrace, NothingReduced, StageOutput

HIDDEN = 24
TOO_LARGE = -2
KERNEL_SETS = [((1, 1), (1, 2), (2, 2)), ((1, 1), (2, 2), (4, 4)), ((2, 1),), ((3, 2), (1, 1))]


@dataclass(frozen=True)
class Prompt:
    """Text, then images, each with text after it."""

    num_text_before: int
    images: tuple[tuple[tuple[int, int], int], ...]
    """Per image, its grid and the number of text rows after it."""
    num_text_at_end: int
    router_offsets: tuple[int, ...]
    """Router rows, from the first row of the text at the end."""

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return tuple(grid for grid, _ in self.images)

    @property
    def image_starts(self) -> tuple[int, ...]:
        starts, row = [], self.num_text_before
        for (height, width), num_text in self.images:
            starts.append(row)
            row += height * width + num_text
        return tuple(starts)

    @property
    def num_rows(self) -> int:
        return self.text_at_end + self.num_text_at_end

    @property
    def text_at_end(self) -> int:
        return self.num_text_before + sum(height * width + num_text for (height, width), num_text in self.images)

    @property
    def router_rows(self) -> np.ndarray:
        rows = [self.text_at_end + offset for offset in self.router_offsets] if self.images else []
        return np.array(rows, dtype=np.int32)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    at_end = draw(st.integers(1, 5))
    grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
    images = draw(st.lists(st.tuples(grids, st.integers(0, 3)), max_size=3))
    offsets = draw(st.lists(st.integers(0, at_end - 1), min_size=1, max_size=2, unique=True))
    return Prompt(draw(st.integers(0, 4)), tuple(images), at_end, tuple(sorted(offsets)))


def make_reducer(
    kernels: tuple[tuple[int, int], ...], adaptive: bool, function: PoolingFunction, seed: int
) -> tuple[PoolingReducer, dict[str, torch.Tensor]]:
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
    return PoolingReducer(config, 0, weights, HostDevice()), weights


def expected_sample(
    x: torch.Tensor,
    prompt: Prompt,
    kernels: tuple[tuple[int, int], ...],
    adaptive: bool,
    function: str,
    forced: int,
    weights: dict[str, torch.Tensor],
    bias: float,
) -> tuple[torch.Tensor, list[int], list[tuple[int, int]]]:
    """By the published rules: one sample's rows, and per image its expert (-1: skipped, -2: too large) and grid."""
    expert, scale = max(forced, 0), 1.0
    if adaptive and prompt.images:
        row = x[prompt.router_rows].mean(0)
        w = {name.split("router.")[-1]: tensor.double() for name, tensor in weights.items()}
        row = functional.layer_norm(row, row.shape, w["norm.weight"], w["norm.bias"], 1e-5)
        logits = functional.gelu(row @ w["hidden.weight"].T) @ w["predictor.weight"].T
        levels = torch.tensor([sorted({a * b for a, b in kernels}).index(h * v) for h, v in kernels])
        probs = ((logits + bias * levels) / 10).softmax(0)
        expert = int(probs.argmax()) if forced < 0 else forced
        scale = float(probs[expert])
    parts, experts, grids, row = [], [], [], 0
    for start, (height, width) in zip(prompt.image_starts, prompt.grids, strict=True):
        image = x[start : start + height * width]
        parts.append(x[row:start])
        row = start + height * width
        kernel = kernels[expert]
        if height * width < max(16, *(k[0] * k[1] for k in kernels)):
            found, pooled = SKIPPED, image
        elif height < kernel[0] or width < kernel[1]:
            found, pooled = TOO_LARGE, image
        else:
            found, pooled = expert, pool(image, (height, width), expert, kernel, function, weights) * scale
            height, width = height // kernel[0], width // kernel[1]
        parts.append(pooled)
        experts.append(found)
        grids.append((height, width))
    return torch.cat([*parts, x[row:]]), experts, grids


def pool(
    image: torch.Tensor,
    grid: tuple[int, int],
    expert: int,
    kernel: tuple[int, int],
    function: str,
    weights: dict[str, torch.Tensor],
) -> torch.Tensor:
    x = image.view(*grid, HIDDEN).permute(2, 0, 1)[None]
    if function == "max":
        pooled = functional.max_pool2d(x, kernel)
    elif function == "avg":
        pooled = functional.avg_pool2d(x, kernel)
    else:
        weight = weights[f"boundaries.0.experts.{expert}.weight"].double().T.reshape(HIDDEN, 1, *kernel)
        pooled = functional.conv2d(x, weight, stride=kernel, groups=HIDDEN)
    return pooled[0].flatten(1).T


def choices(experts: Sequence[int] | np.ndarray) -> list[Choice]:
    return [Choice(int(expert)) for expert in experts]


def apply(
    reducer: PoolingReducer, x: torch.Tensor, layout: Layout, forced: np.ndarray, biases: np.ndarray | None = None
) -> tuple[torch.Tensor, Layout, BoundaryTrace]:
    """Rows and layout of the next stage, and the trace."""
    biases = np.zeros(layout.num_seqs) if biases is None else biases
    reduced = reducer.reduce(StageOutput(x, layout, choices(forced), biases))
    if reduced is None:
        return x, layout, NothingReduced.of(layout)
    return reduced.rows[: reduced.num_rows], *reduced.finish()


@settings(max_examples=120, deadline=None)
@given(
    batch=st.lists(prompts(), min_size=1, max_size=5),
    kernels=st.sampled_from(KERNEL_SETS),
    adaptive=st.booleans(),
    function=st.sampled_from(["max", "avg", "conv"]),
    seed=st.integers(0, 2**31),
)
def test_reducer(
    batch: list[Prompt], kernels: tuple[tuple[int, int], ...], adaptive: bool, function: PoolingFunction, seed: int
) -> None:
    random = np.random.default_rng(seed)
    reducer, weights = make_reducer(kernels, adaptive, function, seed)
    layout = Layout.of_prompts(batch)
    x = torch.from_numpy(random.standard_normal((layout.num_rows, HIDDEN)).astype(np.float32))
    forced = random.integers(-1 if adaptive else 0, len(kernels), len(batch)).astype(np.int32)
    biases = random.choice([-30.0, 0.0, 5.0, 200.0], len(batch))
    rows, pooled, trace = apply(reducer, x, layout, forced, biases)
    assert pooled.num_rows == len(rows)
    most_rows = reducer.most_rows(layout, choices(forced))
    for i, prompt in enumerate(batch):
        sample = x[layout.cu_seqlens[i] : layout.cu_seqlens[i + 1]].double()
        expected, experts, grids = expected_sample(
            sample, prompt, kernels, adaptive, function, int(forced[i]), weights, biases[i]
        )
        outcome = trace.outcome(i)
        assert (outcome.failure is not None) == (TOO_LARGE in experts)
        for found, wanted in zip(outcome.experts, experts, strict=True):
            assert wanted == TOO_LARGE or found == (None if wanted == SKIPPED else wanted)
        images = slice(*pooled.cu_images[i : i + 2])
        assert [tuple(grid) for grid in pooled.grids[images]] == grids
        actual = rows[pooled.cu_seqlens[i] : pooled.cu_seqlens[i + 1]]
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
        # Where the choice is known, the rows are exactly the predicted ones; elsewhere not more.
        is_known = forced[i] >= 0 or all(expert == SKIPPED for expert in experts)
        assert most_rows[i] == (pooled if is_known else layout).kv_lengths[i]
        # The router's rows are still the same rows of text.
        moved = pooled.router_rows_from(pooled.cu_seqlens)[pooled.cu_router_rows[i] : pooled.cu_router_rows[i + 1]]
        assert torch.equal(rows[moved.tolist()], x[(prompt.router_rows + layout.cu_seqlens[i]).tolist()])
        where = slice(pooled.cu_seqlens[i], pooled.cu_seqlens[i + 1])
        assert pooled.positions[where].tolist() == pooled.cache_rows[where].tolist() == list(range(len(actual)))
    assert_parts_are_the_same(reducer, x, layout, (rows, pooled, trace), forced, biases)


def assert_parts_are_the_same(
    reducer: PoolingReducer,
    x: torch.Tensor,
    layout: Layout,
    whole: tuple[torch.Tensor, Layout, BoundaryTrace],
    forced: np.ndarray,
    biases: np.ndarray,
) -> None:
    """`select` of layout and trace gives the same as a batch of only the selected sequences."""
    kept = np.arange(0, layout.num_seqs, 2)
    rows = torch.cat([x[layout.cu_seqlens[i] : layout.cu_seqlens[i + 1]] for i in kept])
    found, pooled, trace = apply(reducer, rows, layout.select(kept), forced[kept], biases[kept])
    all_rows, all_pooled, all_trace = whole
    for name in ("lengths", "cu_images", "image_starts", "grids", "router_rows", "cu_router_rows", "num_visual"):
        assert getattr(pooled, name).tolist() == getattr(all_pooled.select(kept), name).tolist(), name
    parts = [all_rows[all_pooled.cu_seqlens[i] : all_pooled.cu_seqlens[i + 1]] for i in kept]
    assert torch.equal(found, torch.cat(parts))
    for index, original in enumerate(kept):
        for each in (trace.outcome(index), all_trace.select(kept).outcome(index)):
            wanted = all_trace.outcome(int(original))
            assert (list(each.experts), each.choice.expert) == (list(wanted.experts), wanted.choice.expert)
            assert str(each.failure) == str(wanted.failure)


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
        x, layout, _ = apply(
            PoolingReducer(config, index, {}, HostDevice()), x, layout, np.array([expert], dtype=np.int32)
        )
        lengths.append(int(layout.lengths[0]))
    bound = config.most_rows(prompt.num_rows, [(grid,) for grid in prompt.grids], choices(known))
    assert all(length <= most for length, most in zip(lengths, bound, strict=True))
    assert config.most_rows(prompt.num_rows, [(grid,) for grid in prompt.grids], choices(taken)) == tuple(lengths)
