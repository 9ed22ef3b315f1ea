from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.conftest import assert_close_to_reference, poisoned, random_rows, seeded

KERNELS = [(1, 1), (1, 2), (2, 2), (3, 1), (4, 4)]
FUNCTIONS = ["max", "avg", "conv"]


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets(counts: list[int]) -> Tensor:
    return int32([0, *counts]).cumsum(0).to(torch.int32)


@dataclass(frozen=True)
class Image:
    before: int  # rows of text between it and the image before, or the start of the sequence
    grid: tuple[int, int]
    expert: int  # index into KERNELS, -1: skip

    @property
    def rows(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def out_rows(self) -> int:
        if self.expert < 0:
            return self.rows
        kh, kw = KERNELS[self.expert]
        return (self.grid[0] // kh) * (self.grid[1] // kw)


@dataclass(frozen=True)
class Sample:
    """One sequence: images, each after some text, and text at the end."""

    images: tuple[Image, ...]
    after: int

    @property
    def length(self) -> int:
        return sum(image.before + image.rows for image in self.images) + self.after

    @property
    def out_length(self) -> int:
        return sum(image.before + image.out_rows for image in self.images) + self.after

    @property
    def starts(self) -> list[int]:
        """First visual row of each image."""
        ends = [0]
        for image in self.images:
            ends.append(ends[-1] + image.before + image.rows)
        return [end + image.before for end, image in zip(ends, self.images, strict=False)]

    @property
    def copied(self) -> list[tuple[int, int]]:
        """The index of every copied row before and after pooling."""
        pairs, before, after = [], 0, 0
        for image in (*self.images, Image(self.after, (0, 0), -1)):
            rows = image.before + (image.rows if image.expert < 0 else 0)
            pairs += [(before + i, after + i) for i in range(rows)]
            before, after = before + image.before + image.rows, after + image.before + image.out_rows
        return pairs


def one_image(before: int, grid: tuple[int, int], after: int, expert: int) -> Sample:
    return Sample((Image(before, grid, expert),), after)


def text(rows: int) -> Sample:
    return Sample((), rows)


class Batch:
    def __init__(
        self, samples: list[Sample], hidden_size: int, dtype: torch.dtype, generator: torch.Generator,
        function: str = "max", scaled: bool = True,
    ) -> None:  # fmt: skip
        self.samples, self.function = samples, function
        self.images = [image for sample in samples for image in sample.images]
        self.x = random_rows(generator, (sum(s.length for s in samples), hidden_size), dtype, 2.0)
        self.scales = torch.rand(len(self.images), generator=generator) if scaled else None
        self.conv_weights = (
            [random_rows(generator, (kh * kw, hidden_size), dtype) for kh, kw in KERNELS]
            if function == "conv"
            else None
        )

    @property
    def arguments(self) -> dict[str, object]:
        samples = self.samples
        return {
            "x": self.x,
            "cu_seqlens": offsets([s.length for s in samples]),
            "cu_images": offsets([len(s.images) for s in samples]),
            "image_starts": int32([start for s in samples for start in s.starts]),
            "grids": int32([image.grid for image in self.images]).reshape(-1, 2),
            "experts": int32([image.expert for image in self.images]),
            "kernels": int32(KERNELS),
            "out_cu_seqlens": offsets([s.out_length for s in samples]),
            "scales": self.scales,
            "function": self.function,
            "conv_weights": self.conv_weights,
        }

    def run(self) -> Tensor:
        out = poisoned((sum(s.out_length for s in self.samples), self.x.shape[1]), self.x.dtype)
        return ops.pool(**self.arguments, out=out)  # type: ignore[arg-type]

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        """The reference: every part of every sequence by itself, with torch's own pooling, in `dtype`."""
        lengths = [s.length for s in self.samples]
        scales = [1.0] * len(self.images) if self.scales is None else self.scales.to(dtype).unbind()
        parts = []
        for sample, rows in zip(self.samples, self.x.split(lengths) if lengths else [], strict=True):
            mine, scales = scales[: len(sample.images)], scales[len(sample.images) :]
            parts.append(self._pooled(sample, rows.to(dtype), mine))
        return parts

    def _pooled(self, sample: Sample, rows: Tensor, scales: Sequence[Tensor | float]) -> Tensor:
        parts = []
        for image, scale in zip(sample.images, scales, strict=True):
            before, visual, rows = rows.split([image.before, image.rows, len(rows) - image.before - image.rows])
            parts += [before, visual if image.expert < 0 else self._pooled_image(image, visual) * scale]
        return torch.cat([*parts, rows])

    def _pooled_image(self, image: Image, visual: Tensor) -> Tensor:
        kernel, channels = KERNELS[image.expert], visual.t().unflatten(1, image.grid)[None]
        if self.function == "max":
            pooled = functional.max_pool2d(channels, kernel)
        elif self.function == "avg":
            pooled = functional.avg_pool2d(channels, kernel)
        else:
            assert self.conv_weights is not None
            weight = self.conv_weights[image.expert].to(visual.dtype).t().unflatten(1, kernel).unsqueeze(1)
            pooled = functional.conv2d(channels, weight, stride=kernel, groups=visual.shape[1])
        return pooled[0].flatten(1).t()


MIXED = [
    one_image(3, (4, 6), 2, 2), text(5), one_image(0, (5, 5), 1, 1), one_image(2, (6, 7), 0, 4),
    one_image(1, (4, 4), 1, 0), one_image(4, (3, 3), 2, -1), one_image(0, (7, 2), 0, 3),
]  # fmt: skip
# Images next to each other, first and last in their sequence, skipped ones among them, all skipped, and none.
SEVERAL = [
    Sample((Image(0, (4, 4), 2), Image(0, (5, 5), 2)), 0), text(3),
    Sample((Image(2, (3, 5), 1), Image(1, (4, 4), -1), Image(0, (6, 3), 3), Image(3, (2, 2), 2)), 2),
    Sample((Image(0, (2, 3), -1), Image(0, (1, 4), -1)), 1), one_image(1, (4, 4), 1, 4),
    Sample((Image(0, (3, 3), -1), Image(0, (4, 4), 4), Image(2, (9, 1), 3), Image(0, (3, 3), -1)), 0), text(0),
    Sample(tuple(Image(i % 2, (2 + i, 3), (0, 1, 2, 3, -1)[i % 5]) for i in range(7)), 4),
]  # fmt: skip
LARGE = [
    *(one_image(35, (24, 24), 40, expert) for expert in (0, 1, 2, 4)), text(20),
    Sample((Image(35, (24, 24), 2), Image(0, (12, 16), -1), Image(9, (24, 24), 1), Image(0, (24, 30), 4)), 40),
]  # fmt: skip
BATCHES = {"mixed": MIXED, "several": SEVERAL}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("hidden_size", [1, 15, 16, 33, 128])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
def test_pool(
    generator: torch.Generator, dtype: torch.dtype, samples: list[Sample], hidden_size: int, function: str, scaled: bool
) -> None:
    batch = Batch(samples, hidden_size, dtype, generator, function, scaled)
    out = batch.run()
    reference, same_precision = torch.cat(batch.reference(torch.float64)), torch.cat(batch.reference(dtype))
    assert_close_to_reference(out, reference, same_precision)
    if function == "max" and not scaled:
        assert torch.equal(out, same_precision)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
def test_text_rows_and_skipped_images_are_copied_bit_by_bit(
    generator: torch.Generator, dtype: torch.dtype, samples: list[Sample], function: str
) -> None:
    batch = Batch(samples, 20, dtype, generator, function)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    # Any bits, also those of NaN and infinity.
    limits = torch.iinfo(bits)
    batch.x = torch.randint(limits.min, limits.max, batch.x.shape, generator=generator, dtype=bits).view(dtype)
    out, x = batch.run().view(bits), batch.x.view(bits)
    first, out_first = 0, 0
    for sample in samples:
        rows = torch.tensor(sample.copied, dtype=torch.int64).reshape(-1, 2)
        assert torch.equal(out[out_first + rows[:, 1]], x[first + rows[:, 0]])
        first, out_first = first + sample.length, out_first + sample.out_length


@pytest.mark.parametrize("samples", [[], [text(0)], [text(2)], [one_image(0, (1, 1), 0, 0)]], ids=str)
def test_smallest_batches(generator: torch.Generator, dtype: torch.dtype, samples: list[Sample]) -> None:
    batch = Batch(samples, 8, dtype, generator)
    out = batch.run()
    assert out.shape == batch.x.shape
    assert not out.isnan().any()


def test_large_batch_in_parallel(generator: torch.Generator, dtype: torch.dtype) -> None:
    batch = Batch(LARGE, 300, dtype, generator)
    reference, same_precision = torch.cat(batch.reference(torch.float64)), torch.cat(batch.reference(dtype))
    assert_close_to_reference(batch.run(), reference, same_precision)


def test_nan_reaches_every_window_that_holds_it(generator: torch.Generator, dtype: torch.dtype) -> None:
    for place in range(4):  # a comparison that drops NaN at one place of the window would show
        batch = Batch([one_image(1, (4, 4), 1, 2)], 40, dtype, generator)
        batch.x[1 + [0, 1, 4, 5][place], 38] = float("nan")
        out = batch.run()
        assert out[1, 38].isnan()
        assert out.isnan().sum() == 1


image_strategy = st.builds(
    lambda before, grid, expert: Image(
        before, grid, expert if expert >= 0 and all(k <= n for k, n in zip(KERNELS[expert], grid, strict=True)) else -1
    ),
    st.integers(0, 4), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(-1, len(KERNELS) - 1),
)  # fmt: skip
sample_strategy = st.builds(
    lambda images, after: Sample(tuple(images), after), st.lists(image_strategy, max_size=4), st.integers(0, 4)
)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    samples=st.lists(sample_strategy, min_size=1, max_size=6),
    function=st.sampled_from(FUNCTIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_batch_gives_each_sequence_what_it_gets_alone_in_any_order(
    seed: int, samples: list[Sample], function: str, dtype: torch.dtype
) -> None:
    generator = seeded(seed)
    batch = Batch(samples, 19, dtype, generator, function)
    together = batch.run().split([s.out_length for s in samples])
    rows = batch.x.split([s.length for s in samples])
    assert batch.scales is not None
    scales = batch.scales.split([len(s.images) for s in samples])

    def run(order: list[int]) -> list[Tensor]:
        part = Batch([samples[b] for b in order], 19, dtype, generator, function)
        part.x, part.scales = torch.cat([rows[b] for b in order]), torch.cat([scales[b] for b in order])
        part.conv_weights = batch.conv_weights
        return list(part.run().split([samples[b].out_length for b in order]))

    for b, out in enumerate(together):
        assert torch.equal(run([b])[0], out)
    order = torch.randperm(len(samples), generator=generator).tolist()
    for b, out in zip(order, run(order), strict=True):
        assert torch.equal(out, together[b])


def test_several_images_are_pooled_as_each_alone(generator: torch.Generator, dtype: torch.dtype) -> None:
    sample = SEVERAL[2]
    batch = Batch([sample], 33, dtype, generator, "avg")
    assert batch.scales is not None
    out, first, out_first = batch.run(), 0, 0
    for image, start, scale in zip(sample.images, sample.starts, batch.scales.split(1), strict=True):
        alone = Batch([one_image(image.before, image.grid, 0, image.expert)], 33, dtype, generator, "avg")
        alone.x, alone.scales = batch.x[first : start + image.rows], scale
        pooled = alone.run()
        assert torch.equal(out[out_first : out_first + len(pooled)], pooled)
        first, out_first = start + image.rows, out_first + len(pooled)
    assert torch.equal(out[out_first:], batch.x[first:])


def test_strided_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    batch = Batch(MIXED, 24, dtype, generator)
    expected = batch.run()
    wide = random_rows(generator, (batch.x.shape[0], 40), dtype)
    wide[:, 9:33] = batch.x
    batch.x = wide[:, 9:33]
    assert torch.equal(batch.run(), expected)


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name(generator: torch.Generator) -> None:
    # 2 rows, a grid of 4 x 4, 1 row, a grid of 2 x 2 and 1 row: 7 + 2 rows are left; then 3 rows of text.
    good = Batch([Sample((Image(2, (4, 4), 2), Image(1, (2, 2), 2)), 1), text(3)], 8, torch.float32, generator)
    arguments = {**good.arguments, "out": poisoned((12, 8), torch.float32)}
    conv = [torch.zeros(kh * kw, 8) for kh, kw in KERNELS]
    cases: list[tuple[dict[str, object], str]] = [
        ({"x": good.x[0]}, r"x has shape \[8\]"),
        ({"x": good.x.half()}, "x has dtype float16"),
        ({"x": good.x[:-1]}, r"cu_seqlens\[2\] is 27, expected num_tokens=26"),
        ({"x": good.x[:, ::2]}, "x has stride 2"),
        ({"cu_seqlens": int32([0, 24])}, r"cu_images has shape \[3\], expected \[num_seqs \+ 1=2\]"),
        ({"cu_seqlens": int32([])}, "cu_seqlens is empty, expected num_seqs \\+ 1 entries"),
        ({"cu_seqlens": int32([0, 28, 27])}, r"cu_seqlens\[2\] is 27, expected at least 28"),
        ({"cu_seqlens": int32([0, 22, 27])}, r"grids\[1\] is 2x2 from row 19 on, but the sequence has 22 rows"),
        ({"cu_images": int32([0, 2])}, r"cu_images has shape \[2\], expected \[num_seqs \+ 1=3\]"),
        ({"cu_images": int32([0, 1, 1])}, r"cu_images\[2\] is 1, expected num_images=2"),
        ({"cu_images": int32([1, 2, 2])}, r"cu_images\[0\] is 1, expected 0"),
        ({"cu_images": int32([0, 3, 2])}, r"cu_images\[2\] is 2, expected at least 3"),
        ({"cu_images": int32([0, 1, 2])}, "out_cu_seqlens gives sequence 0 9 rows, expected 12"),
        (
            {
                "cu_images": int32([0, 0, 2]),
                "experts": int32([-1, -1]),
                "out": poisoned((27, 8), torch.float32),
                "out_cu_seqlens": int32([0, 24, 27]),
            },
            r"grids\[0\] is 4x4 from row 2 on, but the sequence has 3 rows",
        ),
        ({"cu_images": torch.tensor([0, 2, 2])}, "cu_images has dtype int64"),
        ({"image_starts": int32([2])}, r"image_starts has shape \[1\], expected \[num_images=2\]"),
        ({"image_starts": int32([-1, 19])}, r"grids\[0\] is 4x4 from row -1 on"),
        ({"image_starts": int32([2, 21])}, r"grids\[1\] is 2x2 from row 21 on, but the sequence has 24 rows"),
        ({"image_starts": int32([2**31 - 1, 19])}, r"grids\[0\] is 4x4 from row"),
        ({"image_starts": int32([4, 19])}, r"image_starts\[1\] is 19, expected at least 20, where the image before it"),
        ({"image_starts": int32([8, 2])}, r"image_starts\[1\] is 2, expected at least 24, where the image before it"),
        ({"grids": int32([4, 4])}, r"grids has shape \[2\]"),
        ({"grids": int32([[6, 4], [2, 2]])}, r"grids\[0\] is 6x4 from row 2 on"),
        ({"grids": int32([[5, 4], [2, 2]])}, r"image_starts\[1\] is 19, expected at least 22"),
        ({"grids": int32([[2**31 - 1, 2**31 - 1], [2, 2]])}, r"grids\[0\] is 2147483647x2147483647"),
        ({"grids": int32([[-4, -4], [2, 2]])}, r"grids\[0\] is -4x-4, expected no negative size"),
        ({"grids": int32([[0, 4], [2, 2]])}, r"experts\[0\] has the kernel 2x2, which does not fit its grid 0x4"),
        ({"grids": int32([[16, 1], [2, 2]])}, r"experts\[0\] has the kernel 2x2, which does not fit its grid 16x1"),
        ({"experts": int32([5, 2])}, r"experts\[0\] is 5, expected -1 to 4"),
        ({"experts": int32([2, -2])}, r"experts\[1\] is -2"),
        ({"experts": int32([2, 4])}, r"experts\[1\] has the kernel 4x4, which does not fit its grid 2x2"),
        ({"experts": int32([1, 2])}, "out_cu_seqlens gives sequence 0 9 rows, expected 13 from its experts"),
        ({"experts": int32([2, -1])}, "out_cu_seqlens gives sequence 0 9 rows, expected 12 from its experts"),
        ({"experts": torch.tensor([2, 2])}, "experts has dtype int64"),
        ({"kernels": int32([[1, 1], [1, 2], [0, 2]])}, "kernels has the entry 0 at flat index 4"),
        ({"kernels": int32([1, 1])}, r"kernels has shape \[2\]"),
        ({"out_cu_seqlens": int32([0, 8, 12])}, "out_cu_seqlens gives sequence 0 8 rows, expected 9"),
        ({"out_cu_seqlens": int32([0, 9, 13])}, r"out_cu_seqlens\[2\] is 13, expected num_tokens=12"),
        ({"out_cu_seqlens": int32([0, 13, 12])}, r"out_cu_seqlens\[2\] is 12, expected at least 13"),
        ({"out_cu_seqlens": int32([0, 9, -1]), "out": None}, "out_cu_seqlens ends with -1"),
        ({"out_cu_seqlens": int32([]), "out": None}, "out_cu_seqlens is empty"),
        ({"scales": torch.ones(3)}, r"scales has shape \[3\], expected \[num_images=2\]"),
        ({"scales": torch.ones(2).bfloat16()}, "scales has dtype bfloat16"),
        ({"function": "min"}, "function is 'min', expected 'max', 'avg' or 'conv'"),
        ({"function": "conv"}, "conv_weights must be given for function 'conv'"),
        ({"conv_weights": conv}, "conv_weights must be given for function 'conv' and for no other"),
        ({"function": "conv", "conv_weights": conv[:2]}, "conv_weights has 2 entries, expected one for each of 5"),
        ({"function": "conv", "conv_weights": conv[::-1]}, r"conv_weights\[0\] has shape \[16, 8\]"),
        ({"out": poisoned((12, 9), torch.float32)}, r"out has shape \[12, 9\]"),
        ({"out": good.x[:12]}, "out shares memory with x"),
    ]
    for change, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            ops.pool(**{**arguments, **change})  # type: ignore[arg-type]
    assert arguments["out"].isnan().all()  # type: ignore[union-attr]
