"""Helpers of every kernel test: its device, new random inputs, poisoned outputs, and a relative tolerance.

Every test runs on the CPU, and again on the GPU where there is one. The device is torch's default one, so a test
creates its tensors there. A test that takes `dtype` runs with each dtype of the device. Modules set `DTYPES` or
`DEVICES` where theirs differ, and tests for the CPU alone are marked `@pytest.mark.cpu_only`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from dpn_rt import _kernels
from tests.skips import NO_CUDA_BUILD, NO_GPU

DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.float32, torch.bfloat16, torch.float16]}
ATTENTION_DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16, torch.float16]}
CPU_ONLY = ["cpu"]

HAS_GPU = torch.cuda.is_available()
GPU_MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_GPU and _kernels.has_cuda), reason=NO_CUDA_BUILD if HAS_GPU else NO_GPU),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    devices = getattr(metafunc.module, "DEVICES", ["cpu", "cuda"])
    if metafunc.definition.get_closest_marker("cpu_only") or os.environ.get("DPN_RT_CPU_ISA"):
        devices = CPU_ONLY
    dtypes = getattr(metafunc.module, "DTYPES", DTYPES)
    takes_dtype = "dtype" in metafunc.fixturenames
    cases = [(device, dtype) for device in devices for dtype in (dtypes[device] if takes_dtype else [None])]
    parameters = [
        pytest.param(
            *((device, dtype) if takes_dtype else (device,)),
            marks=GPU_MARKS if device == "cuda" else [],
            id="-".join([device, *([str(dtype).removeprefix("torch.")] if takes_dtype else [])]),
        )
        for device, dtype in cases
    ]
    metafunc.parametrize(("device", "dtype") if takes_dtype else ("device",), parameters, indirect=["device"])


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of the test's tensors."""
    device = torch.device(getattr(request, "param", "cpu"))
    if device.type == "cpu":
        yield device
        return
    torch.set_default_device(device)
    try:
        yield device
    finally:
        torch.set_default_device(None)


def seeded(seed: int) -> torch.Generator:
    """Random numbers on the test's device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers that differ from run to run, by the seed that is printed when a test fails."""
    return seeded(torch.initial_seed())


def assert_close_to_reference(
    actual: torch.Tensor,
    reference: torch.Tensor,
    same_precision: torch.Tensor,
    floor: float = 1e-6,
) -> None:
    """Assert that the error against the float64 reference is at most twice that of torch in the same precision.

    With few elements torch may be exact by chance. So the rounding of the output is allowed in addition: half a unit in
    the last place of the largest element for bfloat16, and two units for float32, where sums round too. `floor` is an
    absolute allowance.
    """
    assert actual.shape == reference.shape
    assert torch.equal(actual.isnan(), reference.isnan()), "NaN at other places than the reference"
    assert torch.equal(actual.isinf(), reference.isinf()), "infinity at other places than the reference"
    finite = reference.isfinite()
    if not finite.any():
        return
    results = [x.double() for x in (actual, reference, same_precision)]
    actual_values, expected, precise = (x.flatten() if finite.all() else x[finite] for x in results)
    error = (actual_values - expected).abs()
    floor += expected.abs().max().item() * (2**-22 if actual.dtype == torch.float32 else 2**-9)
    allowed = 2 * (precise - expected).abs().max().item() + floor
    worst = int(error.argmax())
    assert error.max().item() <= allowed, (
        f"error {error.max().item():.3e} > {allowed:.3e} at finite element {worst}: "
        f"got {actual_values[worst].item()}, expected {expected[worst].item()}"
    )


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An output tensor full of NaN, so that an element that was not written shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def random_rows(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, offset: float = 0.0
) -> torch.Tensor:
    return (torch.randn(shape, generator=generator, device=generator.device) * scale + offset).to(dtype)


Reference = Callable[..., torch.Tensor]
