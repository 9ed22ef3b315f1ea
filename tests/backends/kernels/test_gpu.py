"""Where `device="cuda"` cannot work, it is refused before anything is loaded, and the error says what would work."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpn_rt import LLM, ops
from dpn_rt.backends.kernels import gpu
from dpn_rt.backends.kernels.gpu import (
    Gpu,
    check_gpu,
    check_model_on_cuda,
    find_gpu,
    open_cuda,
    open_cuda_for_plans,
    probe_kernels,
)
from dpn_rt.errors import ConfigError, KernelArgumentError
from dpn_rt.format.config import ModelConfig
from tests.engine.models import MODEL, VISION, with_decoder, write_random_engine
from tests.places import HAS_GPU
from tests.skips import GPU_PRESENT

BF16 = dataclasses.replace(MODEL, dtype="bfloat16")

without_gpu = pytest.mark.skipif(HAS_GPU, reason=GPU_PRESENT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", ops.CUDA_HEAD_DIMS)
def test_models_that_are_taken(dtype: str, head_dim: int) -> None:
    check_model_on_cuda(with_decoder(dataclasses.replace(MODEL, dtype=dtype), head_dim=head_dim))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODEL, "dtype is float32, expected bfloat16 or float16: build it again with --dtype bfloat16"),
        (with_decoder(BF16, head_dim=24), "decoder's head_dim is 24, expected one of 16, 32, 64, 96, 128"),
        (with_decoder(BF16, head_dim=256), "decoder's head_dim is 256, expected one of [0-9, ]*: use device='cpu'"),
        (with_decoder(BF16, head_dim=80), "80, expected one of .*: build dpn_rt with 80 in DPN_RT_HEAD_DIMS, or use"),
        (
            dataclasses.replace(BF16, vision=dataclasses.replace(VISION, num_heads=4)),
            "vision tower's head_dim is 8, expected one of",
        ),
    ],
)
def test_models_that_are_refused(model: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_cuda(model)


def test_a_tower_that_cannot_run_between_plans_is_refused_and_the_decoder_is_not_asked() -> None:
    vision = dataclasses.replace(VISION, num_heads=4)
    with pytest.raises(ConfigError, match="vision tower's head_dim is 8, expected one of"):
        open_cuda_for_plans(dataclasses.replace(BF16, vision=vision))
    if not HAS_GPU:
        with pytest.raises(ConfigError, match="cannot use a GPU"):
            open_cuda_for_plans(with_decoder(BF16, head_dim=24))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_gpus_that_are_taken(capability: tuple[int, int]) -> None:
    check_gpu(Gpu("some GPU", capability))


@pytest.mark.parametrize("capability", [(7, 5), (5, 2)])
def test_gpus_that_are_refused(capability: tuple[int, int]) -> None:
    number = ".".join(map(str, capability))
    with pytest.raises(ConfigError, match=rf"old GPU has compute capability {number}, expected 8\.0 or newer"):
        check_gpu(Gpu("old GPU", capability))


@pytest.mark.parametrize(("capability", "taken"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_that_multiply_8_bit_floats(capability: tuple[int, int], taken: bool) -> None:
    gpu = Gpu("some GPU", capability)
    check_gpu(gpu, "int8")
    if taken:
        check_gpu(gpu, "fp8")
        return
    number = ".".join(map(str, capability))
    with pytest.raises(ConfigError, match=rf"capability {number}, expected 8\.9 or newer for weights in fp8: .* int8"):
        check_gpu(gpu, "fp8")


def test_a_gpu_is_asked_for_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_gpu", lambda: Gpu("some GPU", (8, 6)))
    with pytest.raises(ConfigError, match="for weights in fp8"):
        open_cuda(dataclasses.replace(BF16, quantize="fp8"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update"),
        RuntimeError("Found no NVIDIA driver on your system. Please check"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
)
def test_torch_says_why_it_has_no_gpu(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(ConfigError) as caught:
        find_gpu()
    first = str(error).partition("\n")[0]
    assert first in str(caught.value) and "\n" not in str(caught.value) and "device='cpu'" in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        KernelArgumentError("rms_norm: x is on cuda, but this build has no CUDA kernels"),
        RuntimeError("rms_norm: CUDA error cudaErrorNoKernelImageForDevice: no kernel image is available"),
    ],
)
def test_kernels_that_do_not_run(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(ops, "rms_norm", refuse)
    with pytest.raises(ConfigError, match="the kernels do not run"):
        probe_kernels(torch.device("cpu"))


@without_gpu
def test_a_machine_without_gpu(tmp_path: Path) -> None:
    engine = write_random_engine(tmp_path / "engine", BF16)
    with pytest.raises(ConfigError, match="on a GPU: torch .* cannot use a GPU"):
        LLM(engine, device="cuda")
    LLM(engine, device="auto")


@without_gpu
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_commands_on_a_machine_without_gpu(tmp_path: Path, command: str) -> None:
    engine = write_random_engine(tmp_path / "engine", BF16)
    arguments = ["--engine", str(engine), "--device", "cuda"] + (["--prompt", "x"] if command == "generate" else [])
    done = subprocess.run(
        [sys.executable, "-m", f"dpn_rt.{command}", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "error: on a GPU: torch" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), True, "0.9", None])
def test_shares_of_memory_that_make_no_sense(tmp_path: Path, share: object) -> None:
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=.*: expected a number above 0 and at most 1"):
        LLM(tmp_path, gpu_memory_utilization=share)  # type: ignore[arg-type]
