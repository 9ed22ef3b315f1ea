from __future__ import annotations

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


@dataclass(frozen=True)
class Sample:
    before: int
    grid: tuple[int, int]
    after: int
    expert: int  # index into KERNELS, -1: skip

    @property
    def length(self) -> int:
        return self.before + self.grid[0] * self.grid[1] + self.after

    @property
    def out_length(self) -> int:
        if self.expert < 0:
            return self.length
        kh, kw = KERNELS[self.expert]
        return self.before + (self.grid[0] // kh) * (self.grid[1] // kw) + self.after


class Batch:
    def __init__(
        self, samples: list[Sample], hidden_size: int, dtype: torch.dtype, generator: torch.Generator,
        function: str = "max", scaled: bool = True,
    ) -> None:  # fmt: skip
        self.samples, self.function = samples, function
        self.x = random_rows(generator, (sum(s.length for s in samples), hidden_size), dtype, 2.0)
        self.scales = torch.rand(len(samples), generator=generator) if scaled else None
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
            "cu_seqlens": int32([0, *(s.length for s in samples)]).cumsum(0).to(torch.int32),
            "image_start": int32([s.before if s.grid[0] else -1 for s in samples]),
            "grids": int32([s.grid for s in samples]).reshape(-1, 2),
            "experts": int32([s.expert for s in samples]),
            "kernels": int32(KERNELS),
            "out_cu_seqlens": int32([0, *(s.out_length for s in samples)]).cumsum(0).to(torch.int32),
            "scales": self.scales,
            "function": self.function,
            "conv_weights": self.conv_weights,
        }

    def padded(self, room: int) -> dict[str, object]:
        """The arguments with every sequence as long as the longest, and `room` rows more, before and after pooling."""
        samples = self.samples
        width = max(s.length for s in samples) + room
        x = torch.full((len(samples) * width, self.x.shape[1]), float("nan"), dtype=self.x.dtype)
        for b, rows in enumerate(self.x.split([s.length for s in samples])):
            x[b * width : b * width + len(rows)] = rows
        out_width = max(s.out_length for s in samples) + room
        return {
            **self.arguments,
            "x": x,
            "cu_seqlens": torch.arange(len(samples) + 1, dtype=torch.int32) * width,
            "out_cu_seqlens": torch.arange(len(samples) + 1, dtype=torch.int32) * out_width,
            "lengths": int32([s.length for s in samples]),
        }

    def run(self) -> Tensor:
        out = poisoned((sum(s.out_length for s in self.samples), self.x.shape[1]), self.x.dtype)
        return ops.pool(**self.arguments, out=out)  # type: ignore[arg-type]

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        """Every sequence by itself, with torch's own pooling, in `dtype`."""
        lengths = [s.length for s in self.samples]
        return [self._pooled(b, rows.to(dtype)) for b, rows in enumerate(self.x.split(lengths) if lengths else [])]

    def _pooled(self, b: int, rows: Tensor) -> Tensor:
        sample = self.samples[b]
        if sample.expert < 0:
            return rows
        kernel = KERNELS[sample.expert]
        text_before, visual, text_after = rows.split([sample.before, sample.grid[0] * sample.grid[1], sample.after])
        image = visual.t().unflatten(1, sample.grid)[None]
        if self.function == "max":
            pooled = functional.max_pool2d(image, kernel)
        elif self.function == "avg":
            pooled = functional.avg_pool2d(image, kernel)
        else:
            assert self.conv_weights is not None
            weight = self.conv_weights[sample.expert].to(rows.dtype).t().unflatten(1, kernel).unsqueeze(1)
            pooled = functional.conv2d(image, weight, stride=kernel, groups=rows.shape[1])
        visual = pooled[0].flatten(1).t()
        if self.scales is not None:
            visual = visual * self.scales[b].to(rows.dtype)
        return torch.cat([text_before, visual, text_after])


MIXED = [
    Sample(3, (4, 6), 2, 2), Sample(5, (0, 0), 0, -1), Sample(0, (5, 5), 1, 1), Sample(2, (6, 7), 0, 4),
    Sample(1, (4, 4), 1, 0), Sample(4, (3, 3), 2, -1), Sample(0, (7, 2), 0, 3),
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("hidden_size", [1, 15, 16, 33, 128])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def test_pool(generator: torch.Generator, dtype: torch.dtype, hidden_size: int, function: str, scaled: bool) -> None:
    batch = Batch(MIXED, hidden_size, dtype, generator, function, scaled)
    out = batch.run()
    reference, same_precision = torch.cat(batch.reference(torch.float64)), torch.cat(batch.reference(dtype))
    assert_close_to_reference(out, reference, same_precision)
    if function == "max" and not scaled:
        assert torch.equal(out, same_precision)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_text_rows_and_skipped_sequences_are_copied_bit_by_bit(
    generator: torch.Generator, dtype: torch.dtype, function: str
) -> None:
    batch = Batch(MIXED, 20, dtype, generator, function)
    batch.x[0, 0], batch.x[-1, 3] = float("nan"), -0.0
    expected = batch.reference(dtype)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    for sample, out, exact in zip(MIXED, batch.run().split([s.out_length for s in MIXED]), expected, strict=True):
        text = slice(None) if sample.expert < 0 else [*range(sample.before), *range(-sample.after, 0)]
        assert torch.equal(out[text].contiguous().view(bits), exact[text].contiguous().view(bits))


def assert_padded(padded: Tensor, batch: Batch, packed: Tensor) -> None:
    """Bit by bit what the packed batch gives, with zeros behind each sequence."""
    parts = packed.split([s.out_length for s in batch.samples])
    for rows, wanted in zip(padded.unflatten(0, (len(parts), -1)), parts, strict=True):
        assert torch.equal(rows[: len(wanted)], wanted)
        assert not rows[len(wanted) :].any()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("room", [0, 3])
def test_padded_rows(generator: torch.Generator, dtype: torch.dtype, function: str, room: int) -> None:
    """What lies behind a sequence is not read: it is NaN."""
    batch = Batch(MIXED, 33, dtype, generator, function)
    arguments = batch.padded(room)
    out = poisoned((int(arguments["out_cu_seqlens"][-1]), 33), dtype)  # type: ignore[index]
    assert_padded(ops.pool(**arguments, out=out), batch, batch.run())  # type: ignore[arg-type]
    with pytest.raises(KernelArgumentError, match="lengths without out"):
        ops.pool(**arguments)  # type: ignore[arg-type]


def test_many_padded_rows_in_parallel(generator: torch.Generator, dtype: torch.dtype) -> None:
    """Threads begin and end within images, text and room."""
    samples = [Sample(35, (24, 24), 40, expert) for expert in (2, 0, 4)] + [Sample(20, (0, 0), 0, -1)]
    batch = Batch(samples, 300, dtype, generator)
    arguments = batch.padded(1)
    out = poisoned((int(arguments["out_cu_seqlens"][-1]), 300), dtype)  # type: ignore[index]
    assert_padded(ops.pool(**arguments, out=out), batch, batch.run())  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [[], [Sample(0, (0, 0), 0, -1)], [Sample(0, (1, 1), 0, 0)]], ids=str)
def test_smallest_batches(generator: torch.Generator, dtype: torch.dtype, samples: list[Sample]) -> None:
    batch = Batch(samples, 8, dtype, generator)
    out = batch.run()
    assert out.shape == batch.x.shape
    assert not out.isnan().any()


def test_large_batch_in_parallel(generator: torch.Generator, dtype: torch.dtype) -> None:
    samples = [Sample(35, (24, 24), 40, expert) for expert in (0, 1, 2, 4)] + [Sample(20, (0, 0), 0, -1)]
    batch = Batch(samples, 300, dtype, generator)
    reference, same_precision = torch.cat(batch.reference(torch.float64)), torch.cat(batch.reference(dtype))
    assert_close_to_reference(batch.run(), reference, same_precision)


def test_nan_reaches_every_window_that_holds_it(generator: torch.Generator, dtype: torch.dtype) -> None:
    for place in range(4):  # a comparison that drops NaN at one place of the window would show
        batch = Batch([Sample(1, (4, 4), 1, 2)], 40, dtype, generator)
        batch.x[1 + [0, 1, 4, 5][place], 38] = float("nan")
        out = batch.run()
        assert out[1, 38].isnan()
        assert out.isnan().sum() == 1


sample_strategy = st.builds(
    lambda before, grid, after, expert: Sample(
        before, grid, after,
        expert if expert >= 0 and grid[0] >= KERNELS[expert][0] and grid[1] >= KERNELS[expert][1] else -1,
    ),
    st.integers(0, 4), st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.just((0, 0)), st.integers(0, 4),
    st.integers(-1, len(KERNELS) - 1),
)  # fmt: skip


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
    scales = batch.scales
    assert scales is not None

    def run(order: list[int]) -> list[Tensor]:
        part = Batch([samples[b] for b in order], 19, dtype, generator, function)
        part.x, part.scales, part.conv_weights = torch.cat([rows[b] for b in order]), scales[order], batch.conv_weights
        return list(part.run().split([samples[b].out_length for b in order]))

    for b, out in enumerate(together):
        assert torch.equal(run([b])[0], out)
    order = torch.randperm(len(samples), generator=generator).tolist()
    for b, out in zip(order, run(order), strict=True):
        assert torch.equal(out, together[b])


def test_strided_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    batch = Batch(MIXED, 24, dtype, generator)
    expected = batch.run()
    wide = random_rows(generator, (batch.x.shape[0], 40), dtype)
    wide[:, 9:33] = batch.x
    batch.x = wide[:, 9:33]
    assert torch.equal(batch.run(), expected)


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name(generator: torch.Generator) -> None:
    good = Batch([Sample(2, (4, 4), 1, 2), Sample(3, (0, 0), 0, -1)], 8, torch.float32, generator)
    arguments = {**good.arguments, "out": poisoned((10, 8), torch.float32)}  # 7 and 3 rows
    conv = [torch.zeros(kh * kw, 8) for kh, kw in KERNELS]
    cases: list[tuple[dict[str, object], str]] = [
        ({"x": good.x[0]}, r"x has shape \[8\]"),
        ({"x": good.x.half()}, "x has dtype float16"),
        ({"x": good.x[:-1]}, r"cu_seqlens\[2\] is 22, expected num_tokens=21"),
        ({"x": good.x[:, ::2]}, "x has stride 2"),
        ({"cu_seqlens": int32([0, 19])}, r"cu_seqlens has shape \[2\], expected \[num_seqs \+ 1=3\]"),
        ({"cu_seqlens": int32([0, 23, 22])}, r"cu_seqlens\[2\] is 22, expected at least 23"),
        ({"image_start": int32([2])}, r"image_start has shape \[1\]"),
        ({"image_start": int32([-1, -1])}, r"experts\[0\] is 2, but the sequence has no image"),
        ({"image_start": int32([4, -1])}, r"grids\[0\] is 4x4 from row 4 on, but the sequence has 19 rows"),
        ({"image_start": int32([2**31 - 1, -1])}, r"grids\[0\] is 4x4 from row"),
        ({"grids": int32([4, 4])}, r"grids has shape \[2\]"),
        ({"grids": int32([[5, 4], [0, 0]])}, r"grids\[0\] is 5x4 from row 2 on"),
        ({"grids": int32([[2**31 - 1, 2**31 - 1], [0, 0]])}, r"grids\[0\] is 2147483647x2147483647"),
        ({"grids": int32([[0, 4], [0, 0]])}, "the sequence has no image: image_start 2, grid 0x4"),
        ({"grids": int32([[16, 1], [0, 0]])}, r"experts\[0\] has the kernel 2x2, which does not fit its grid 16x1"),
        ({"experts": int32([5, -1])}, r"experts\[0\] is 5, expected -1 to 4"),
        ({"experts": int32([-2, -1])}, r"experts\[0\] is -2"),
        ({"experts": int32([2, 0])}, r"experts\[1\] is 0, but the sequence has no image"),
        ({"experts": int32([1, -1])}, "out_cu_seqlens gives sequence 0 7 rows, expected 11 from its expert"),
        ({"experts": torch.tensor([2, -1])}, "experts has dtype int64"),
        ({"kernels": int32([[1, 1], [1, 2], [0, 2]])}, "kernels has the entry 0 at flat index 4"),
        ({"kernels": int32([1, 1])}, r"kernels has shape \[2\]"),
        ({"out_cu_seqlens": int32([0, 6, 10])}, "out_cu_seqlens gives sequence 0 6 rows, expected 7"),
        ({"out_cu_seqlens": int32([0, 7, 11])}, r"out_cu_seqlens\[2\] is 11, expected num_tokens=10"),
        ({"out_cu_seqlens": int32([0, 11, 10])}, r"out_cu_seqlens\[2\] is 10, expected at least 11"),
        ({"out_cu_seqlens": int32([0, 7, -1]), "out": None}, "out_cu_seqlens ends with -1"),
        ({"out_cu_seqlens": int32([]), "out": None}, "out_cu_seqlens is empty"),
        ({"lengths": int32([19])}, r"lengths has shape \[1\], expected \[num_seqs=2\]"),
        ({"lengths": int32([20, 3])}, r"lengths\[0\] is 20, expected 0 to 19"),
        ({"lengths": int32([19, -1])}, r"lengths\[1\] is -1, expected 0 to 3"),
        ({"lengths": int32([17, 3])}, r"grids\[0\] is 4x4 from row 2 on, but the sequence has 17 rows"),
        ({"lengths": int32([19, 3]), "out_cu_seqlens": int32([0, 6, 10])}, "sequence 0 6 rows, expected at least 7"),
        ({"scales": torch.ones(3)}, r"scales has shape \[3\], expected \[num_seqs=2\]"),
        ({"scales": torch.ones(2).bfloat16()}, "scales has dtype bfloat16"),
        ({"function": "min"}, "function is 'min', expected 'max', 'avg' or 'conv'"),
        ({"function": "conv"}, "conv_weights must be given for function 'conv'"),
        ({"conv_weights": conv}, "conv_weights must be given for function 'conv' and for no other"),
        ({"function": "conv", "conv_weights": conv[:2]}, "conv_weights has 2 entries, expected one for each of 5"),
        ({"function": "conv", "conv_weights": conv[::-1]}, r"conv_weights\[0\] has shape \[16, 8\]"),
        ({"out": poisoned((10, 9), torch.float32)}, r"out has shape \[10, 9\]"),
        ({"out": good.x[:10]}, "out shares memory with x"),
    ]
    for change, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            ops.pool(**{**arguments, **change})  # type: ignore[arg-type]
    assert arguments["out"].isnan().all()  # type: ignore[union-attr]
