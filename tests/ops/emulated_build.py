"""Builds what `tests/ops/emulated.py` loads, and the programs that test the emulation itself."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.skips import NO_COMPILER

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "emulation"
BUILD = ROOT / "build" / "emulated-cpu"
# The kernels are optimised by options of their own; nothing else takes time in these tests.
DEFINITIONS = [
    "DPN_RT_EMULATED_CPU=ON", "DPN_RT_CUDA=OFF", "CMAKE_BUILD_TYPE=Debug", "CMAKE_CXX_FLAGS_DEBUG="
]  # fmt: skip


def build_kernels() -> None:
    """Compile the sources that have changed, one process at a time."""
    spec = importlib.util.spec_from_file_location("build_in_place", ROOT / "cmake" / "build_in_place.py")
    assert spec is not None and spec.loader is not None
    build_in_place = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_in_place)
    if shutil.which("g++") is None or build_in_place.tool("cmake") is None:
        pytest.skip(NO_COMPILER)
    BUILD.mkdir(parents=True, exist_ok=True)
    configure, build, _ = build_in_place.commands(BUILD, DEFINITIONS)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(configure)
        run(build)


def build_program(name: str, folder: Path) -> Path:
    """The program of one file of `emulation/`."""
    if shutil.which("g++") is None:
        pytest.skip(NO_COMPILER)
    program = folder / name
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    run(["g++", *flags, "-o", str(program), str(FOLDER / f"{name}.cpp")])
    return program


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
