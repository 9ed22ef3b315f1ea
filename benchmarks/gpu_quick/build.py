"""Builds the kernels for this GPU into the source tree, and runs one. Warnings of the compilers are no errors."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_quick.record import Recorder
from benchmarks.gpu_quick.settings import Settings

SCRIPT = Path(__file__).resolve().parents[2] / "cmake" / "build_in_place.py"
OPTIONS = ("DPN_RT_CUDA=ON", "DPN_RT_WARNINGS_AS_ERRORS=OFF")


def architectures() -> tuple[str, ...]:
    """An option with that of torch's GPU alone: CMake asks nvidia-smi, and builds two where that is not there."""
    import torch

    if not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability()
    return (f"DPN_RT_CUDA_ARCHITECTURES={'90a-real' if (major, minor) == (9, 0) else f'{major}{minor}'}",)


def run(settings: Settings, record: Recorder) -> None:
    if settings.device == "cuda":
        definitions = [part for option in (*OPTIONS, *architectures()) for part in ("-D", option)]
        start = time.monotonic()
        done = subprocess.run([sys.executable, str(SCRIPT), *definitions], check=False, stderr=subprocess.STDOUT)
        record.put(seconds=time.monotonic() - start, exit_status=done.returncode)
        if done.returncode != 0:
            raise RuntimeError(f"the build failed with exit status {done.returncode}, see the lines above")
        record.say(f"built in {record.values['seconds']:.0f} s")

    import torch

    from dpn_rt import _kernels, ops

    record.put(has_cuda=bool(_kernels.has_cuda))
    x = ops.rms_norm(torch.ones(1, 8, device=settings.device), torch.ones(8, device=settings.device), 1e-5)
    if not torch.allclose(x.cpu(), torch.ones(1, 8), atol=1e-4):
        raise RuntimeError(f"rms_norm of ones is {x.tolist()}, expected ones")
    record.say(f"a kernel runs on {settings.device}; CUDA kernels: {'yes' if _kernels.has_cuda else 'no'}")
