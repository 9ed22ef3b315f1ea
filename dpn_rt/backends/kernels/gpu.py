"""Checks whether this machine's GPU can run an engine. Every error says what would work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpn_rt import ops
from dpn_rt.device.cuda import CudaDevice
from dpn_rt.errors import ConfigError, KernelArgumentError
from dpn_rt.format.config import OLDEST_CAPABILITY, ModelConfig
from dpn_rt.schema.dtypes import Quantize

DTYPES = ("bfloat16", "float16")
"""Dtypes that attention takes on a GPU."""
FP8_CAPABILITY = (8, 9)
"""Oldest compute capability of a GPU that multiplies 8-bit floats."""
ELSEWHERE = "use device='cpu', or build the engine without plans for it"
"""End of an error message: what works without a GPU."""


@dataclass(frozen=True)
class Gpu:
    """The GPU that torch uses."""

    name: str
    capability: tuple[int, int]


def open_cuda(model: ModelConfig, number: int | None = None) -> CudaDevice:
    """A GPU, if it can run this model.

    Args:
        model: of the engine.
        number: of the GPU, which becomes the current one; None: the current one.

    Raises:
        ConfigError: there is no driver or GPU, the GPU or the driver is too old, this build has no CUDA kernels, or the
            model has a dtype, a head size or weights that they do not take.
    """
    check_model_on_cuda(model)
    if number is not None:
        if number >= (count := torch.cuda.device_count()):
            raise ConfigError(f"on a GPU: each rank takes a GPU, expected at least {number + 1} of them, found {count}")
        torch.cuda.set_device(number)
    return _open(model.quantize)


def open_cuda_for_plans(model: ModelConfig) -> CudaDevice:
    """The current GPU, if it can run the parts of this model that are not in TensorRT plans: all but the decoder.

    Raises:
        ConfigError: as `open_cuda`.
    """
    _check_tower(model)
    return _open(model.quantize)


def _open(quantize: Quantize) -> CudaDevice:
    check_gpu(find_gpu(), quantize)
    device = CudaDevice()
    probe_kernels(device.torch_device)
    return device


def check_model_on_cuda(model: ModelConfig) -> None:
    """Refuse a model that the CUDA kernels do not take.

    Raises:
        ConfigError: names the dtype or the head size that they do not take.
    """
    if model.dtype not in DTYPES:
        raise ConfigError(
            f"on a GPU: the engine's dtype is {model.dtype}, expected {' or '.join(DTYPES)}: build it again with "
            "--dtype bfloat16"
        )
    _check_head_dim("decoder", model.decoder.head_dim)
    _check_tower(model)


def _check_tower(model: ModelConfig) -> None:
    for head_dim in () if model.vision is None else model.vision.head_dims:
        _check_head_dim("vision tower", head_dim)


def _check_head_dim(part: str, head_dim: int) -> None:
    if head_dim not in ops.CUDA_HEAD_DIMS:
        built = ", ".join(map(str, ops.CUDA_HEAD_DIMS))
        other = "" if head_dim % 16 or head_dim > 128 else f"build dpn_rt with {head_dim} in DPN_RT_HEAD_DIMS, or "
        raise ConfigError(f"on a GPU: the {part}'s head_dim is {head_dim}, expected one of {built}: {other}{ELSEWHERE}")


def find_gpu() -> Gpu:
    """The current GPU.

    Raises:
        ConfigError: torch cannot use a GPU; gives torch's reason.
    """
    try:
        torch.empty(1, device="cuda")
        return Gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"on a GPU: torch {torch.__version__} cannot use a GPU ({reason}): expected an NVIDIA GPU, its driver "
            f"and a build of torch with CUDA; or {ELSEWHERE}"
        ) from error


def check_gpu(gpu: Gpu, quantize: Quantize = "none") -> None:
    """Refuse a GPU that the kernels are not built for, or that does not multiply an engine's weights.

    Args:
        gpu: of this machine.
        quantize: form of the engine's matrices.

    Raises:
        ConfigError: names its compute capability.
    """
    if gpu.capability < OLDEST_CAPABILITY:
        raise ConfigError(f"on a GPU: {_too_old(gpu, OLDEST_CAPABILITY)}: {ELSEWHERE}")
    if quantize == "fp8" and gpu.capability < FP8_CAPABILITY:
        raise ConfigError(
            f"on a GPU: {_too_old(gpu, FP8_CAPABILITY)} for weights in fp8: build the engine with --quantize int8, or "
            "use device='cpu'"
        )


def _too_old(gpu: Gpu, least: tuple[int, int]) -> str:
    found, oldest = (".".join(map(str, pair)) for pair in (gpu.capability, least))
    return f"{gpu.name} has compute capability {found}, expected {oldest} or newer"


def probe_kernels(device: torch.device) -> None:
    """Run one kernel on `device` to see whether kernels run there.

    Raises:
        ConfigError: this build has no kernels for the GPU, or the driver is too old for them; gives the reason.
    """
    try:
        ops.rms_norm(torch.ones(1, 8, device=device), torch.ones(8, device=device), 1e-5)
        torch.cuda.synchronize(device)
    except (KernelArgumentError, RuntimeError) as error:
        raise ConfigError(
            f"on a GPU: the kernels do not run ({error}): expected a build with nvcc for this GPU and a driver that is "
            f"not older than it; or {ELSEWHERE}"
        ) from error
