from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.conftest import CPU_ONLY, assert_close_to_reference, poisoned, random_rows

DEVICES = CPU_ONLY

# (images, height, width, channels): one pixel, smaller than the kernel, around blocks of 3 and 6 pixels and 16 rows,
# around vectors and pairs of vectors of 4 to 16 channels
SHAPES = [
    (1, 1, 1, 1),
    (2, 2, 3, 5),
    (1, 6, 7, 8),
    (1, 12, 12, 16),
    (2, 16, 13, 31),
    (1, 17, 24, 32),
    (1, 33, 6, 33),
    (1, 15, 50, 48),
    (3, 24, 19, 40),
    (1, 40, 5, 96),
    (0, 4, 4, 8),
    (1, 0, 4, 8),
    (1, 4, 0, 8),
    (1, 4, 4, 0),
]


def convolved(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    filters = taps.t().reshape(-1, 1, 7, 7)
    result = functional.conv2d(x.permute(0, 3, 1, 2), filters, bias, padding=3, groups=x.shape[-1])
    return result.permute(0, 2, 3, 1).contiguous()


def random_inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    shapes = (shape, (49, shape[-1]), (shape[-1],))
    return [random_rows(generator, size, dtype) for size in shapes]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_depthwise_conv(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, taps, bias = random_inputs(generator, shape, dtype)
    out = ops.depthwise_conv(x, taps, bias, out=poisoned(shape, dtype))
    if out.numel() == 0:
        return
    reference = convolved(x.double(), taps.double(), bias.double())
    assert_close_to_reference(out, reference, convolved(x, taps, bias), floor=2e-6)
    assert torch.equal(out, ops.depthwise_conv(x, taps, bias))


def test_an_image_does_not_depend_on_its_batch(generator: torch.Generator, dtype: torch.dtype) -> None:
    x, taps, bias = random_inputs(generator, (3, 20, 11, 37), dtype)
    alone = [ops.depthwise_conv(image.unsqueeze(0), taps, bias) for image in x]
    assert torch.equal(ops.depthwise_conv(x, taps, bias), torch.cat(alone))


@pytest.mark.parametrize("place", [(0, 0), (0, 9), (19, 0), (19, 10), (16, 5)], ids=str)
def test_nan_stays_within_its_neighbourhood(
    generator: torch.Generator, dtype: torch.dtype, place: tuple[int, int]
) -> None:
    x, taps, bias = random_inputs(generator, (2, 20, 11, 37), dtype)
    x[1, place[0], place[1], 33] = float("nan")
    rows, columns = torch.arange(20)[:, None], torch.arange(11)[None]
    near = ((rows - place[0]).abs() <= 3) & ((columns - place[1]).abs() <= 3)
    expected = torch.zeros(x.shape, dtype=torch.bool)
    expected[1, :, :, 33] = near
    assert torch.equal(ops.depthwise_conv(x, taps, bias).isnan(), expected)


def test_bad_arguments_are_refused_by_name() -> None:
    x, taps, bias = torch.zeros(1, 4, 5, 8), torch.zeros(49, 8), torch.zeros(8)
    cases = [
        (lambda: ops.depthwise_conv(x[0], taps, bias), r"x has shape \[4, 5, 8\], expected \[num_images"),
        (lambda: ops.depthwise_conv(x.transpose(1, 2), taps, bias), "x .* has stride"),
        (lambda: ops.depthwise_conv(x.half(), taps.half(), bias.half()), "x has dtype float16"),
        (lambda: ops.depthwise_conv(x, taps[:25], bias), r"taps has shape \[25, 8\], expected .*num_taps=49"),
        (lambda: ops.depthwise_conv(x, taps[:, :7], bias), r"taps has shape \[49, 7\], expected .*channels=8"),
        (lambda: ops.depthwise_conv(x, taps.bfloat16(), bias), "taps has dtype bfloat16, expected float32"),
        (lambda: ops.depthwise_conv(x, taps, bias[:7]), r"bias has shape \[7\], expected \[channels=8\]"),
        (lambda: ops.depthwise_conv(x, taps, bias.bfloat16()), "bias has dtype bfloat16"),
        (lambda: ops.depthwise_conv(x, taps, bias, out=torch.zeros(1, 4, 5, 9)), r"out has shape \[1, 4, 5, 9\]"),
        (lambda: ops.depthwise_conv(x, taps, bias, out=x), "out shares memory with x"),
        (lambda: ops.depthwise_conv(x, taps, bias, out=torch.zeros(1, 4, 5, 8).bfloat16()), "out has dtype bfloat16"),
        (lambda: ops.depthwise_conv(x.to("meta"), taps, bias), "x is on "),
        (lambda: ops.depthwise_conv(x, None, bias), "taps is of type NoneType"),  # type: ignore[arg-type]
    ]
    for call, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            call()
