"""Builds the kernels into the source tree with what this machine has: nothing is downloaded and nothing is installed.

    python cmake/build_in_place.py [--build-dir build/in-place] [-D NAME=VALUE ...]

Afterwards this Python runs the package from the root of the repository. For machines that come with Python, torch and
CUDA but without a network; elsewhere `make test` makes an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILDERS = '''"""Written by cmake/build_in_place.py: the package in builders/."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "builders")]
'''
OLDEST_PYTHON = (3, 11)
LEAST_DISK_BYTES = 10**9
"""Several times the objects of a build with CUDA kernels."""
# Import name -> name on PyPI, of what the package, its kernel tests and its benchmarks import.
PACKAGES = {
    "hypothesis": "hypothesis", "numpy": "numpy", "PIL": "pillow", "pybind11": "pybind11", "pytest": "pytest",
    "safetensors": "safetensors", "torch": "torch", "tqdm": "tqdm", "transformers": "transformers",
}  # fmt: skip


def missing_packages() -> list[str]:
    """Names on PyPI of what this Python lacks."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]


def tool(name: str) -> str | None:
    """Path of a program: beside this Python, where its package would put it, else on the PATH."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    return shutil.which(name, path=beside) or shutil.which(name)


def problems(definitions: Sequence[str] = (), build_dir: Path = ROOT) -> list[str]:
    """All that stands in the way of a build with these CMake definitions."""
    found = []
    if sys.version_info < OLDEST_PYTHON:
        found.append(f"this is Python {sys.version.split()[0]}, expected {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    if missing := missing_packages():
        found.append(f"this Python ({sys.executable}) lacks: {', '.join(missing)}")
    if tool("cmake") is None:
        found.append("there is no cmake, neither on the PATH nor as a package of this Python")
    compiler = os.environ.get("CXX") or "c++"
    if not any(tool(name) for name in (compiler.split()[0], "g++", "clang++")):
        found.append("there is no C++ compiler: expected c++, g++ or clang++ on the PATH, or its path in CXX")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        found.append(f"there is no {header}: expected the headers of this Python (python3-dev)")
    if "DPN_RT_CUDA=ON" in definitions and not (os.environ.get("CUDACXX") or tool("nvcc")):
        found.append("there is no nvcc: expected it on the PATH, or its path in CUDACXX")
    place = next(path for path in (build_dir, *build_dir.parents) if path.exists())
    if (free := shutil.disk_usage(place).free) < LEAST_DISK_BYTES:
        found.append(f"{place} has {free / 1e9:.1f} GB free, expected {LEAST_DISK_BYTES / 1e9:.1f} GB")
    return found


def commands(build_dir: Path, definitions: list[str]) -> list[list[str]]:
    """Configure, build, copy the extension into dpn_rt/."""
    import pybind11

    cmake = tool("cmake")
    assert cmake is not None
    ninja = tool("ninja")
    configure = [
        cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *([f"-DCMAKE_MAKE_PROGRAM={ninja}", "-G", "Ninja"] if ninja else []), *(f"-D{d}" for d in definitions),
    ]  # fmt: skip
    return [
        configure,
        [cmake, "--build", str(build_dir), "--parallel", str(os.cpu_count() or 1)],
        [cmake, "--install", str(build_dir), "--prefix", str(ROOT)],
    ]


def map_builders() -> None:
    """`builders/` becomes `dpn_rt.builders`, as in an installed package."""
    (ROOT / "dpn_rt" / "builders.py").write_text(BUILDERS, encoding="utf-8")


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "in-place")
    parser.add_argument("-D", dest="definitions", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    if found := problems(options.definitions, options.build_dir):
        sys.exit("cannot build: " + "; ".join(found))
    for command in commands(options.build_dir, options.definitions):
        result = subprocess.run(command, check=False)
        if result.returncode != 0:
            sys.exit(f"this command failed with exit status {result.returncode}: {' '.join(command)}")
    map_builders()


if __name__ == "__main__":
    main()
