from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import HALVES, Guards, assert_near
from tests.cuda.emulated import Kernels
from tests.ops.test_pool import (
    BATCHES,
    FUNCTIONS,
    KERNELS,
    Batch,
    Image,
    Sample,
    one_image,
    text,
)  # fmt: skip


def run(kernels: Kernels, guards: Guards, batch: Batch, extra_rows: int = 0) -> Tensor:
    arguments = batch.arguments
    given = {name: guards.put(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    num_out = int(arguments["out_cu_seqlens"][-1])  # type: ignore[index]
    out = guards.poisoned(num_out + extra_rows, batch.x.shape[1], dtype=batch.x.dtype)
    weights = [guards.put(w) for w in batch.conv_weights] if batch.conv_weights else None
    kernels.pool(
        out, given["x"], given["cu_seqlens"], given["cu_images"], given["image_starts"], given["grids"],
        given["experts"], given["kernels"], given["out_cu_seqlens"], given["scales"],
        batch.function, weights, len(weights or []),
    )  # fmt: skip
    assert out[num_out:].isnan().all(), "rows after the batch were written"
    return out[:num_out]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("hidden_size", [1, 24, 33, 2056])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
def test_pool(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, samples: list[Sample],
    hidden_size: int, function: str, scaled: bool,
) -> None:  # fmt: skip
    batch = Batch(samples, hidden_size, dtype, generator, function, scaled)
    out = run(kernels, guards, batch, extra_rows=2)
    assert_near(out, torch.cat(batch.reference(torch.float64)), 1.0, 1e-6)


def test_float32_and_grids_that_do_not_divide(kernels: Kernels, guards: Guards, generator: torch.Generator) -> None:
    samples = [one_image(2, (5, 7), 3, expert) for expert in range(len(KERNELS))]
    samples.append(Sample(tuple(Image(1, (5, 7), expert) for expert in range(len(KERNELS))), 2))
    batch = Batch(samples, 20, torch.float32, generator, "avg")
    assert_near(run(kernels, guards, batch), torch.cat(batch.reference(torch.float64)), 4.0, 1e-6)


def test_text_is_copied_bit_by_bit(kernels: Kernels, guards: Guards, generator: torch.Generator) -> None:
    for dtype in HALVES:
        batch = Batch([one_image(2, (4, 4), 1, 2), one_image(3, (3, 3), 0, -1)], 24, dtype, generator)
        batch.x[0, 0], batch.x[18, 3], batch.x[-1, 5] = float("nan"), -0.0, float("inf")
        out = run(kernels, guards, batch).view(torch.int16)
        x = batch.x.view(torch.int16)
        assert torch.equal(out[:2], x[:2])
        assert torch.equal(out[6:], x[18:])


def test_nan_wins(kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype) -> None:
    for place in (0, 1, 4, 5):
        batch = Batch([one_image(1, (4, 4), 1, 2)], 16, dtype, generator)
        batch.x[1 + place, 3] = float("nan")
        out = run(kernels, guards, batch)
        assert out[1, 3].isnan()
        assert out.isnan().sum() == 1


@pytest.mark.parametrize("samples", [[], [text(0)], [text(2)], [one_image(0, (1, 1), 0, 0)]], ids=str)
def test_smallest_batches(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, samples: list[Sample]
) -> None:
    batch = Batch(samples, 8, dtype, generator)
    assert not run(kernels, guards, batch).isnan().any()
