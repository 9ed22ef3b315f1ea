"""The other instruction sets of this processor, each in its own process, since a process chooses only once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpn_rt import ops
from tests.ops.conftest import CPU_ONLY
from tests.ops.emulated_build import build_kernels
from tests.skips import FORCED_ISA, SUPPORTED_BY_CPU, UNSUPPORTED_BY_CPU

DEVICES = CPU_ONLY
HERE = Path(__file__).parent
QUANTIZED = ("test_linear_int8.py", "test_linear_int4.py", "test_activated_products.py")
ATTENTION = (
    "test_attention.py", "test_attention_extend.py", "test_attention_windows.py", "test_attention_decode.py"
)  # fmt: skip
# The files with tests of an instruction set's own kernels; none: it has all kernels.
ISAS: dict[str, tuple[str, ...]] = {
    "portable": (), "avx2": (), "avx512": (), "avx512_vnni": QUANTIZED, "avx512_bf16": (),
    "amx": (*QUANTIZED, *ATTENTION),
}  # fmt: skip
# Of an instruction set with all kernels. Other files have kernels that use no instruction of AVX-512 by name, only the
# compiler's vectors; test_attention.py takes minutes, and extending a prefill is the same kernel.
EMULATED = (
    *QUANTIZED, "test_attention_extend.py", "test_attention_decode.py", "test_linear.py", "test_last_row_scores.py",
    "test_activation.py", "test_quantize.py", "test_route.py",
)  # fmt: skip
CHOICE = "test_isa_choice.py"
# The same with every instruction set.
WITHOUT_KERNELS = (__file__, HERE / "test_emulation.py")
OTHERS = [
    pytest.param(isa, marks=pytest.mark.skipif(isa not in ops.available_cpu_isas(), reason=UNSUPPORTED_BY_CPU))
    for isa in ISAS
    if isa != ops.cpu_isa()
]
MISSING = [
    pytest.param(isa, marks=pytest.mark.skipif(isa in ops.available_cpu_isas(), reason=SUPPORTED_BY_CPU))
    for isa in ("avx512", "avx512_vnni", "avx512_bf16", "amx")
]


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        # Passive waiting: otherwise this process's threads may still spin on the cores that the other process needs.
        # And pytest starts faster without other packages' plugins.
        env={
            "OMP_WAIT_POLICY": "passive",
            **os.environ,
            "DPN_RT_CPU_ISA": isa,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_tests(isa: str, files: Sequence[str], *options: str) -> None:
    options = ("-q", "-x", "-p", "no:cacheprovider", *options, *(f"--ignore={file}" for file in WITHOUT_KERNELS))
    result = run(isa, "-m", "pytest", *options, *(str(HERE / name) for name in (*files, CHOICE)))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def files_of(isa: str) -> Sequence[str]:
    """Where the tests of this process have not run its kernels: the best instruction set takes what it has no kernels
    of its own for from the next one that has all."""
    *others, best = ops.available_cpu_isas()
    below = next(name for name in reversed(others) if not ISAS[name])
    return ISAS[isa] or (isa == below and ISAS[best]) or [""]


@pytest.mark.skipif(bool(os.environ.get("DPN_RT_CPU_ISA")), reason=FORCED_ISA)
@pytest.mark.parametrize("isa", OTHERS)
def test_kernels_pass_their_tests_with(isa: str) -> None:
    run_tests(isa, files_of(isa), "-m", "not gpu")


@pytest.mark.skipif(bool(os.environ.get("DPN_RT_CPU_ISA")), reason=FORCED_ISA)
@pytest.mark.parametrize("isa", MISSING)
def test_kernels_pass_their_tests_with_emulated(isa: str) -> None:
    """Where the processor lacks an instruction set, plain C++ stands for its instructions."""
    build_kernels()
    # Float32 goes the same way in all of them.
    run_tests(isa, ISAS[isa] or EMULATED, "-m", "not gpu", "-k", "not float32", "-p", "tests.ops.emulated")


def test_an_unknown_instruction_set_is_refused_by_name_whatever_asks_for_it_first() -> None:
    code = """
        import os, sys, torch
        from dpn_rt import ops
        for ask in (ops.cpu_isa, lambda: ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-5)):
            if not os.fork():
                ask()
                sys.exit("it is not refused")
            os.wait()
    """
    told = run("avx99", "-c", textwrap.dedent(code)).stderr
    messages = re.findall(r"DPN_RT_CPU_ISA is 'avx99', expected one of: .*portable", told)
    assert len(messages) == 2 and "it is not refused" not in told, told
