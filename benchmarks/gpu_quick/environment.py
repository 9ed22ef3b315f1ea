"""The machine: GPU, driver, compilers, packages, room; and its rates of copies and matrix products."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_quick.record import Recorder
from benchmarks.gpu_quick.settings import Settings

COMMANDS = {
    "gpu": ("nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"),
    "nvcc": ("nvcc", "--version"),
    "c++": ("c++", "--version"),
    "cmake": ("cmake", "--version"),
    "ninja": ("ninja", "--version"),
    "compute-sanitizer": ("compute-sanitizer", "--version"),
}
PACKAGES = ("torch", "transformers", "numpy", "pytest", "hypothesis", "triton", "flash-attn", "scikit-learn")
COPIED_BYTES, PRODUCT = 4 << 30, 8192


def run(settings: Settings, record: Recorder) -> None:
    record.say(f"Python {platform.python_version()}, {os.cpu_count()} cores, {free_gigabytes():.0f} GB of disk free")
    for name, command in COMMANDS.items():
        found = answer(command)
        record.put(**{name: found})
        record.say(f"{name}: {found}")
    versions = {name: version(name) for name in PACKAGES}
    record.put(packages=versions)
    record.say(", ".join(f"{name} {found}" for name, found in versions.items()))
    record.attempt("rates", lambda: rates(settings, record))


def rates(settings: Settings, record: Recorder) -> None:
    """Bytes/s of a copy, read and written bytes counted, and FLOP/s of a matrix product."""
    import torch

    from benchmarks.measuring.clock import is_cuda, replayable, seconds

    device = settings.device
    if is_cuda(device):
        record.put(torch_cuda=torch.version.cuda, arch_list=torch.cuda.get_arch_list())
    size, side = (COPIED_BYTES, PRODUCT) if is_cuda(device) else (1 << 20, 64)
    with torch.inference_mode():
        source = torch.ones(size // 8, dtype=torch.int64, device=device)
        target = torch.empty_like(source)
        left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
        copy = replayable(lambda: target.copy_(source), device)
        product = replayable(lambda: left @ right, device)
        copies = sorted(2 * size / seconds(copy, device) for _ in range(5))
        products = sorted(2 * side**3 / seconds(product, device) for _ in range(9))
    record.put(copy_bytes_per_second=copies[2], product_flops_per_second=products[4])
    record.say(f"copy {copies[2] / 1e12:.2f} TB/s, bf16 product of {side} {products[4] / 1e12:.0f} TFLOP/s")


def answer(command: tuple[str, ...]) -> str:
    """What a program says of itself, in one line; why not where it says nothing."""
    path = shutil.which(command[0]) or shutil.which(command[0], path=str(Path(sys.executable).parent))
    if path is None:
        return "not there"
    try:
        done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    chosen = [line for line in lines if "release" in line.lower() or "version" in line.lower()] or lines
    return chosen[0].strip() if chosen else f"exit status {done.returncode}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not there"


def free_gigabytes() -> float:
    return shutil.disk_usage(Path.cwd()).free / 1e9
