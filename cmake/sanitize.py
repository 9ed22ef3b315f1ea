"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in all tests that run kernels.

    python cmake/sanitize.py [--isa NAME ...] [--skip-build] [TEST ... and other arguments of pytest]

Builds into build/sanitized-cpu, never into the package, and runs the tests once for each instruction set of this
processor. The first finding ends its run: with the sanitizer's report, and the Python stack of the test. Needs GCC.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from build_in_place import ROOT, commands, map_builders, problems

BUILD = ROOT / "build" / "sanitized-cpu"
DEFINITIONS = [
    "DPN_RT_SANITIZE=ON", "DPN_RT_CUDA=OFF", "CMAKE_BUILD_TYPE=Debug", "CMAKE_CXX_FLAGS_DEBUG=",
    "DPN_RT_WARNINGS_AS_ERRORS=OFF",  # the sanitizers' own code gives GCC false alarms
]  # fmt: skip
OPS = [
    "tests/ops", "tests/fuzz/test_kernels.py",
    # These start processes and compilers of their own, and no kernel runs in this one.
    "--ignore=tests/ops/test_isa.py", "--ignore=tests/ops/test_emulation.py",
]  # fmt: skip
# With the best instruction set alone: the same runtime around the same kernels.
GOLDEN = ["tests/test_golden_runtime.py", "tests/test_golden_reducers.py", "tests/test_golden_hr.py"]
QUANTIZED = [f"tests/ops/test_{file}.py" for file in ("linear_int8", "linear_int4", "activated_products")]
ATTENTION = [f"tests/ops/test_attention{which}.py" for which in ("", "_extend", "_windows", "_decode")]
# Instruction sets that have only some kernels of their own.
PARTS = {"avx512_vnni": QUANTIZED, "amx": [*QUANTIZED, *ATTENTION]}
OPTIONS = [
    "detect_leaks=0",  # Python and torch keep memory until the process ends
    "abort_on_error=1",  # pytest then shows where the test was
    "halt_on_error=1",
    "print_stacktrace=1",
    "allocator_may_return_null=1",  # torch refuses what is too large, as it does without sanitizers
]


def library(name: str) -> str:
    """Path of a library of the compiler."""
    found = subprocess.run(
        [os.environ.get("CXX", "g++"), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"the compiler has no {name}: install the sanitizers of GCC")
    return found


def environment(isa: str) -> dict[str, str]:
    """AddressSanitizer must be the first library of the process, and find the C++ library beside it."""
    options = ":".join(OPTIONS)
    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": options,
        "DPN_RT_CPU_ISA": isa,
    }


def available_isas() -> list[str]:
    """The instruction sets that the sanitized build has for this processor."""
    code = "import tests.ops.sanitized, dpn_rt.ops as ops; print(*ops.available_cpu_isas())"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(""), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        sys.exit(f"the sanitized kernels cannot be loaded:\n{result.stderr}")
    return result.stdout.split()


def tests_of(isa: str, best: str) -> list[str]:
    """The tests in which an instruction set's own kernels run."""
    return [*PARTS.get(isa, OPS), *(GOLDEN if isa == best else [])]


def build() -> None:
    """Compile the sources that have changed."""
    if found := problems():
        sys.exit("cannot build: " + "; ".join(found))
    configure, compile_all, _ = commands(BUILD, DEFINITIONS)
    for command in (configure, compile_all):
        subprocess.run(command, check=True)
    map_builders()


def run(isa: str, arguments: list[str]) -> bool:
    """Whether the tests pass with one instruction set."""
    print(f"== {isa}", flush=True)
    # pytest must not keep what the sanitizers write to standard error just before the process ends.
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not gpu", "-p", "tests.ops.sanitized", "--capture=sys"]
    return subprocess.run([*command, *arguments], env=environment(isa), cwd=ROOT, check=False).returncode == 0


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", action="append", help="instruction sets to test; default: all of this processor")
    parser.add_argument("--skip-build", action="store_true", help="take the kernels as they were built last")
    options, arguments = parser.parse_known_args()
    if not options.skip_build:
        build()
    isas = available_isas()
    failed = [isa for isa in options.isa or isas if not run(isa, arguments or tests_of(isa, isas[-1]))]
    if failed:
        sys.exit(f"failed with: {', '.join(failed)}")


if __name__ == "__main__":
    main()
